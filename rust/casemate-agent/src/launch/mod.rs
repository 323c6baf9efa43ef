//! Making processes of containers.
//!
//! The agent has threads, and what a child of a threaded process may do before `exec` is next to nothing. So a
//! **launcher** is forked off before the first thread is made: a process with one thread that clones on request. Its clones
//! are children of the agent (CLONE_PARENT), start in their cgroup (CLONE_INTO_CGROUP: joining later costs an RCU grace
//! period) and build their own surroundings from a [`Plan`] that they read from their status socket. No program is executed
//! before the container's own, nothing is written to disk.
//!
//! On the status socket the child reads the plan, says `Ready` (and hands over the terminal), reads the word to start, and
//! executes; the socket is close-on-exec, so its end means success and an error can come until the last moment.

pub mod capabilities;
pub mod child;
pub mod devices;
pub mod executable;
pub mod identity;
pub mod launcher;
pub mod rootfs;
pub mod status;
pub mod terminal;

use casemate_proto::grpc;
use nix::sched::CloneFlags;

/// What a child shall become.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Plan {
    /// The container's specification.
    #[prost(message, optional, tag = "1")]
    pub spec: Option<grpc::Spec>,
    /// The process, which for a first process is the specification's.
    #[prost(message, optional, tag = "2")]
    pub process: Option<grpc::Process>,
    /// Whether it joins a container (true) or is the first process of one.
    #[prost(bool, tag = "3")]
    pub is_exec: bool,
}

/// Namespaces that a container gets anew, made by the clone.
///
/// The guest is the sandbox: its own ipc and uts namespaces are those that the sandbox's containers share.
pub fn clone_flags(linux: &grpc::Linux, joins_pid_namespace: bool) -> CloneFlags {
    let mut flags = CloneFlags::CLONE_NEWNS;
    if !joins_pid_namespace {
        flags |= CloneFlags::CLONE_NEWPID;
    }
    if linux.namespaces.iter().any(|namespace| namespace.r#type == "network" && namespace.path.is_empty()) {
        flags |= CloneFlags::CLONE_NEWNET;
    }
    flags
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_clone_flags_when_kinds_differ_then_only_the_container_own_are_new() {
        let namespace = |kind: &str| grpc::LinuxNamespace { r#type: kind.into(), path: String::new() };
        let mut linux =
            grpc::Linux { namespaces: vec![namespace("ipc"), namespace("uts")], ..Default::default() };
        assert_eq!(clone_flags(&linux, false), CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID);
        assert_eq!(clone_flags(&linux, true), CloneFlags::CLONE_NEWNS);
        linux.namespaces.push(namespace("network"));
        assert!(clone_flags(&linux, false).contains(CloneFlags::CLONE_NEWNET));
    }
}
