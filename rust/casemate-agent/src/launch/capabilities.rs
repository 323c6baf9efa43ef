//! Capability sets of a process. Source: capabilities(7), `linux/capability.h`.

use casemate_proto::grpc;
use nix::errno::Errno;

use crate::error::{AgentError, Result};

/// Names by number.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The sets, one bit a capability.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CapabilitySets {
    bounding: u64,
    effective: u64,
    inheritable: u64,
    permitted: u64,
    ambient: u64,
}

fn mask_of(names: &[String]) -> Result<u64> {
    names.iter().try_fold(0, |mask, name| {
        // Some callers hand over JSON text.
        let plain = name.trim_matches('"').to_ascii_uppercase();
        let plain = plain.strip_prefix("CAP_").unwrap_or(&plain);
        let number = NAMES.iter().position(|known| *known == plain);
        number
            .map(|number| mask | 1 << number)
            .ok_or_else(|| AgentError::invalid("Capabilities", format!("unknown capability `{name}`")))
    })
}

impl CapabilitySets {
    /// Read the names, with or without `CAP_`.
    pub fn parse(names: &grpc::LinuxCapabilities) -> Result<Self> {
        Ok(Self {
            bounding: mask_of(&names.bounding)?,
            effective: mask_of(&names.effective)?,
            inheritable: mask_of(&names.inheritable)?,
            permitted: mask_of(&names.permitted)?,
            ambient: mask_of(&names.ambient)?,
        })
    }

    /// Give up what is not in the bounding set; needs CAP_SETPCAP still.
    pub fn drop_bounding(&self) -> nix::Result<()> {
        for number in 0..64_u32 {
            if self.bounding & (1 << number) != 0 {
                continue;
            }
            match prctl(libc::PR_CAPBSET_DROP, number.into(), 0) {
                Ok(()) => {}
                // Beyond the last that this kernel knows.
                Err(Errno::EINVAL) => return Ok(()),
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// Set the others. Last: afterwards nothing privileged may be possible.
    pub fn apply(&self) -> nix::Result<()> {
        const VERSION_3: u32 = 0x2008_0522;
        let header = [VERSION_3, 0];
        let halves = |mask: u64| [(mask & u64::from(u32::MAX)) as u32, (mask >> 32) as u32];
        let (effective, permitted, inheritable) =
            (halves(self.effective), halves(self.permitted), halves(self.inheritable));
        let data = [effective[0], permitted[0], inheritable[0], effective[1], permitted[1], inheritable[1]];
        // SAFETY: header and data have the layout of version 3 (two words; two triples) and live until the call returns.
        let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) };
        Errno::result(result)?;
        prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as u64, 0)?;
        for number in (0..64).filter(|number| self.ambient & (1 << number) != 0) {
            // One that is not permitted and inheritable can't be raised: it is left out, as other runtimes do.
            let _left_out = prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE as u64, number);
        }
        Ok(())
    }
}

/// `prctl` with numbers only.
pub fn prctl(option: libc::c_int, second: u64, third: u64) -> nix::Result<()> {
    // SAFETY: the options used here take numbers, no pointers.
    Errno::result(unsafe { libc::prctl(option, second, third, 0_u64, 0_u64) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_parse_when_names_have_each_form_then_bits() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let sets = CapabilitySets::parse(&grpc::LinuxCapabilities {
            bounding: names(&["CAP_CHOWN", "kill", "\"CAP_CHECKPOINT_RESTORE\""]),
            ..Default::default()
        })
        .expect("parses");
        assert_eq!(sets.bounding, 1 | 1 << 5 | 1 << 40);
        assert_eq!(sets.effective, 0);
    }

    #[test]
    fn test_parse_when_name_is_unknown_then_refused() {
        let wrong = grpc::LinuxCapabilities { permitted: vec!["CAP_FLY".into()], ..Default::default() };
        assert!(CapabilitySets::parse(&wrong).expect_err("unknown").to_string().contains("CAP_FLY"));
    }
}
