//! Mount options in the form of `mount -o`, and mounting with them.

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::error::{AgentError, Context, Result};

/// Options of one mount, sorted by where the kernel takes them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountOptions {
    /// Flags of the mount itself.
    pub flags: MsFlags,
    /// Changes of propagation, each a call of its own afterwards.
    pub propagation: Vec<MsFlags>,
    /// What the file system reads, joined by commas.
    pub data: String,
}

/// Whether a name sets (true) or clears (false) its flag.
fn flag_of(option: &str) -> Option<(bool, MsFlags)> {
    const NO_SYM_FOLLOW: MsFlags = MsFlags::from_bits_retain(256);
    Some(match option {
        "defaults" => (true, MsFlags::empty()),
        "ro" => (true, MsFlags::MS_RDONLY),
        "rw" => (false, MsFlags::MS_RDONLY),
        "nosuid" => (true, MsFlags::MS_NOSUID),
        "suid" => (false, MsFlags::MS_NOSUID),
        "nodev" => (true, MsFlags::MS_NODEV),
        "dev" => (false, MsFlags::MS_NODEV),
        "noexec" => (true, MsFlags::MS_NOEXEC),
        "exec" => (false, MsFlags::MS_NOEXEC),
        "sync" => (true, MsFlags::MS_SYNCHRONOUS),
        "async" => (false, MsFlags::MS_SYNCHRONOUS),
        "dirsync" => (true, MsFlags::MS_DIRSYNC),
        "remount" => (true, MsFlags::MS_REMOUNT),
        "mand" => (true, MsFlags::MS_MANDLOCK),
        "nomand" => (false, MsFlags::MS_MANDLOCK),
        "noatime" => (true, MsFlags::MS_NOATIME),
        "atime" => (false, MsFlags::MS_NOATIME),
        "nodiratime" => (true, MsFlags::MS_NODIRATIME),
        "diratime" => (false, MsFlags::MS_NODIRATIME),
        "relatime" => (true, MsFlags::MS_RELATIME),
        "norelatime" => (false, MsFlags::MS_RELATIME),
        "strictatime" => (true, MsFlags::MS_STRICTATIME),
        "nostrictatime" => (false, MsFlags::MS_STRICTATIME),
        "lazytime" => (true, MsFlags::MS_LAZYTIME),
        "nosymfollow" => (true, NO_SYM_FOLLOW),
        "bind" => (true, MsFlags::MS_BIND),
        "rbind" => (true, MsFlags::MS_BIND.union(MsFlags::MS_REC)),
        _ => return None,
    })
}

fn propagation_of(option: &str) -> Option<MsFlags> {
    let (recursive, name) = match option.strip_prefix('r') {
        Some(name) => (MsFlags::MS_REC, name),
        None => (MsFlags::empty(), option),
    };
    let kind = match name {
        "shared" => MsFlags::MS_SHARED,
        "slave" => MsFlags::MS_SLAVE,
        "private" => MsFlags::MS_PRIVATE,
        "unbindable" => MsFlags::MS_UNBINDABLE,
        _ => return None,
    };
    Some(kind | recursive)
}

impl MountOptions {
    /// Sort options given one by one.
    ///
    /// # Errors
    /// `loop` is refused, as is data beyond a page: the kernel would cut it.
    pub fn parse<S: AsRef<str>>(options: &[S]) -> Result<Self> {
        const MAX_DATA_BYTES: usize = 4095;
        let mut parsed = Self { flags: MsFlags::empty(), propagation: Vec::new(), data: String::new() };
        for option in options.iter().map(AsRef::as_ref).filter(|option| !option.is_empty()) {
            if option == "loop" {
                return Err(AgentError::invalid("options", "`loop` is not supported"));
            }
            if let Some((sets, flag)) = flag_of(option) {
                if sets {
                    parsed.flags |= flag;
                } else {
                    parsed.flags -= flag;
                }
            } else if let Some(change) = propagation_of(option) {
                parsed.propagation.push(change);
            } else {
                if !parsed.data.is_empty() {
                    parsed.data.push(',');
                }
                parsed.data.push_str(option);
            }
        }
        if parsed.data.len() > MAX_DATA_BYTES {
            let problem = format!("{} bytes of data, at most {MAX_DATA_BYTES}", parsed.data.len());
            return Err(AgentError::invalid("options", problem));
        }
        Ok(parsed)
    }

    /// Flags that a bind mount takes only in a second, remounting call.
    pub fn bind_remount_flags(&self) -> MsFlags {
        self.flags - (MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_REMOUNT)
    }

    /// Whether it is a bind mount.
    pub fn is_bind(&self) -> bool {
        self.flags.contains(MsFlags::MS_BIND)
    }
}

/// Mount `source` at `target` (both paths of the guest, trusted), with everything the options ask for.
pub fn mount_with(source: &str, target: &str, fstype: &str, options: &MountOptions) -> Result<()> {
    let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let (fstype, data) = (text(fstype), text(&options.data));
    let first =
        if options.is_bind() { options.flags & (MsFlags::MS_BIND | MsFlags::MS_REC) } else { options.flags };
    mount(Some(source), target, fstype.as_deref(), first, data.as_deref())
        .map_err(|errno| AgentError::system("mount", format!("{source} at {target}"), errno))?;
    let again = options.bind_remount_flags();
    if options.is_bind() && !again.is_empty() {
        mount(
            None::<&str>,
            target,
            None::<&str>,
            again | MsFlags::MS_BIND | MsFlags::MS_REMOUNT,
            None::<&str>,
        )
        .context("remount", target)?;
    }
    for change in &options.propagation {
        mount(None::<&str>, target, None::<&str>, *change, None::<&str>)
            .context("mount propagation", target)?;
    }
    Ok(())
}

/// Unmount `target`; not being mounted is success. What is still used goes away with its last user.
pub fn unmount(target: &str) -> Result<()> {
    match umount2(target, MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        Err(Errno::EBUSY) => {
            umount2(target, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH).context("unmount", target)
        }
        Err(errno) => Err(AgentError::system("unmount", target, errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> MountOptions {
        MountOptions::parse(options).expect("parses")
    }

    #[test]
    fn test_parse_when_flags_and_data_are_mixed_then_sorted() {
        let options = parse(&["nosuid", "mode=755", "ro", "", "size=64k", "rw", "rslave"]);
        assert_eq!(options.flags, MsFlags::MS_NOSUID);
        assert_eq!(options.data, "mode=755,size=64k");
        assert_eq!(options.propagation, [MsFlags::MS_SLAVE | MsFlags::MS_REC]);
    }

    #[test]
    fn test_parse_when_bind_is_read_only_then_second_call_has_the_flag() {
        let options = parse(&["rbind", "ro"]);
        assert!(options.is_bind());
        assert_eq!(options.bind_remount_flags(), MsFlags::MS_RDONLY);
    }

    #[test]
    fn test_parse_when_names_begin_with_r_then_not_taken_for_propagation() {
        assert_eq!(parse(&["relatime"]).propagation, []);
        assert_eq!(parse(&["rprivate"]).propagation, [MsFlags::MS_PRIVATE | MsFlags::MS_REC]);
    }

    #[test]
    fn test_parse_when_loop_or_too_much_data_then_refused() {
        assert!(MountOptions::parse(&["loop"]).is_err());
        assert!(MountOptions::parse(&["x".repeat(5000)]).is_err());
    }
}
