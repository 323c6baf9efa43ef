//! Checks of a container's specification before anything is made for it.

use casemate_proto::grpc;

use crate::container::missing;
use crate::error::{AgentError, Result};
use crate::launch::capabilities::CapabilitySets;

/// Check the specification; its process and root are there afterwards.
///
/// # Errors
/// A part is missing, has a wrong form, or asks for what this agent does not do.
pub fn check(spec: &grpc::Spec) -> Result<()> {
    let process = spec.process.as_ref().ok_or_else(|| missing("OCI.Process"))?;
    let root = spec.root.as_ref().ok_or_else(|| missing("OCI.Root"))?;
    let linux = spec.linux.as_ref().ok_or_else(|| missing("OCI.Linux"))?;
    if !root.path.starts_with('/') {
        return Err(AgentError::invalid("Root.Path", format!("`{}` is not absolute", root.path)));
    }
    check_process(process)?;
    check_linux(linux)?;
    let hooks = spec.hooks.as_ref().is_some_and(|hooks| *hooks != grpc::Hooks::default());
    unsupported(hooks, "OCI.Hooks")
}

/// Check a process, of a specification or to be executed besides.
pub fn check_process(process: &grpc::Process) -> Result<()> {
    if process.args.is_empty() {
        return Err(missing("Process.Args"));
    }
    if let Some(names) = &process.capabilities {
        CapabilitySets::parse(names)?;
    }
    unsupported(!process.apparmor_profile.is_empty(), "Process.ApparmorProfile")?;
    unsupported(!process.selinux_label.is_empty(), "Process.SelinuxLabel")
}

fn check_linux(linux: &grpc::Linux) -> Result<()> {
    unsupported(linux.seccomp.is_some(), "Linux.Seccomp")?;
    unsupported(!linux.uid_mappings.is_empty() || !linux.gid_mappings.is_empty(), "Linux.UIDMappings")?;
    unsupported(!linux.mount_label.is_empty(), "Linux.MountLabel")?;
    for namespace in &linux.namespaces {
        match namespace.r#type.as_str() {
            "pid" | "mount" | "ipc" | "uts" | "cgroup" | "network" => {}
            "user" => return unsupported(true, "a user namespace"),
            other => return Err(AgentError::invalid("Namespaces", format!("unknown type `{other}`"))),
        }
        unsupported(!namespace.path.is_empty(), "Namespaces.Path")?;
    }
    linux.sysctl.keys().try_for_each(|key| check_sysctl(key))
}

/// Only parameters of namespaces that the container has to itself or that belong to its sandbox.
fn check_sysctl(key: &str) -> Result<()> {
    const OF_IPC: [&str; 8] = [
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
    ];
    let is_known = OF_IPC.contains(&key) || key == "kernel.domainname";
    let is_of_group = key.starts_with("net.") || key.starts_with("fs.mqueue.");
    if key.contains('/') || key.contains("..") || !(is_known || is_of_group) {
        return Err(AgentError::invalid("Sysctl", format!("`{key}` is not of a namespace of the sandbox")));
    }
    Ok(())
}

fn unsupported(given: bool, what: &str) -> Result<()> {
    if given { Err(AgentError::Unsupported { what: what.to_owned() }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> grpc::Spec {
        grpc::Spec {
            process: Some(grpc::Process { args: vec!["sh".into()], ..Default::default() }),
            root: Some(grpc::Root { path: "/r".into(), readonly: false }),
            linux: Some(grpc::Linux::default()),
            ..Default::default()
        }
    }

    #[test]
    fn test_check_when_whole_then_ok_and_each_missing_part_is_einval() {
        check(&spec()).expect("is right");
        let without: [fn(&mut grpc::Spec); 4] = [
            |spec| spec.process = None,
            |spec| spec.root = None,
            |spec| spec.linux = None,
            |spec| spec.process = Some(grpc::Process::default()),
        ];
        for change in without {
            let mut spec = spec();
            change(&mut spec);
            assert!(check(&spec).expect_err("missing").to_string().contains("EINVAL"));
        }
    }

    #[test]
    fn test_check_when_root_is_relative_or_namespace_unknown_then_refused() {
        let mut relative = spec();
        relative.root = Some(grpc::Root { path: "r".into(), readonly: false });
        assert!(check(&relative).is_err());
        let mut unknown = spec();
        let namespace = grpc::LinuxNamespace { r#type: "dream".into(), path: String::new() };
        unknown.linux = Some(grpc::Linux { namespaces: vec![namespace], ..Default::default() });
        assert!(check(&unknown).is_err());
    }

    #[test]
    fn test_check_when_a_promise_could_not_be_kept_then_unsupported() {
        let mut with_seccomp = spec();
        with_seccomp.linux =
            Some(grpc::Linux { seccomp: Some(grpc::LinuxSeccomp::default()), ..Default::default() });
        assert!(matches!(check(&with_seccomp), Err(AgentError::Unsupported { .. })));
        let mut with_hooks = spec();
        with_hooks.hooks = Some(grpc::Hooks { prestart: vec![grpc::Hook::default()], ..Default::default() });
        assert!(matches!(check(&with_hooks), Err(AgentError::Unsupported { .. })));
    }

    #[test]
    fn test_check_sysctl_when_it_reaches_beyond_the_sandbox_then_refused() {
        for key in ["net.ipv4.ip_forward", "kernel.shmmax", "fs.mqueue.msg_max", "kernel.domainname"] {
            check_sysctl(key).expect(key);
        }
        for key in ["kernel.hostname", "vm.swappiness", "kernel.core_pattern", "net/../kernel/x", "net..x"] {
            assert!(check_sysctl(key).is_err(), "{key}");
        }
    }
}
