//! Who a process is and what it may do: user, groups, limits, capabilities, environment.

use std::fs::File;
use std::io::Read;
use std::os::fd::BorrowedFd;

use casemate_proto::grpc;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, SFlag, fstat, makedev};
use nix::unistd::{Gid, Uid, fchown, setgroups, setresgid, setresuid};

use crate::launch::capabilities::{CapabilitySets, prctl};
use crate::launch::status::{Step, StepError};

type Result<T> = std::result::Result<T, StepError>;

/// Resource limits by name.
#[allow(clippy::unnecessary_cast, reason = "the type differs between C libraries")]
const LIMITS: [(&str, u32); 16] = [
    ("RLIMIT_CPU", libc::RLIMIT_CPU as u32),
    ("RLIMIT_FSIZE", libc::RLIMIT_FSIZE as u32),
    ("RLIMIT_DATA", libc::RLIMIT_DATA as u32),
    ("RLIMIT_STACK", libc::RLIMIT_STACK as u32),
    ("RLIMIT_CORE", libc::RLIMIT_CORE as u32),
    ("RLIMIT_RSS", libc::RLIMIT_RSS as u32),
    ("RLIMIT_NPROC", libc::RLIMIT_NPROC as u32),
    ("RLIMIT_NOFILE", libc::RLIMIT_NOFILE as u32),
    ("RLIMIT_MEMLOCK", libc::RLIMIT_MEMLOCK as u32),
    ("RLIMIT_AS", libc::RLIMIT_AS as u32),
    ("RLIMIT_LOCKS", libc::RLIMIT_LOCKS as u32),
    ("RLIMIT_SIGPENDING", libc::RLIMIT_SIGPENDING as u32),
    ("RLIMIT_MSGQUEUE", libc::RLIMIT_MSGQUEUE as u32),
    ("RLIMIT_NICE", libc::RLIMIT_NICE as u32),
    ("RLIMIT_RTPRIO", libc::RLIMIT_RTPRIO as u32),
    ("RLIMIT_RTTIME", libc::RLIMIT_RTTIME as u32),
];

/// Ids of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// The other groups.
    pub additional_gids: Vec<u32>,
}

/// Set the score of the out-of-memory killer and the limits, while this is privileged and sees the guest's `/proc`.
pub fn apply_limits(process: &grpc::Process) -> Result<()> {
    if process.oom_score_adj != 0 {
        let score = process.oom_score_adj.to_string();
        std::fs::write("/proc/self/oom_score_adj", &score).step("set oom score", &score)?;
    }
    for limit in &process.rlimits {
        let known = LIMITS.iter().find(|(name, _)| *name == limit.r#type);
        let (_, resource) = known.ok_or_else(|| StepError::new("set limit", &limit.r#type, Errno::EINVAL))?;
        let value = libc::rlimit { rlim_cur: limit.soft, rlim_max: limit.hard };
        // SAFETY: a known resource and a live structure.
        let result = unsafe { libc::setrlimit(*resource as _, &raw const value) };
        Errno::result(result).step("set limit", &limit.r#type)?;
    }
    Ok(())
}

/// The ids: numbers as given, or a name `user[:group]` looked up in the container.
pub fn resolve_user(process: &grpc::Process) -> Result<User> {
    let given = process.user.clone().unwrap_or_default();
    if given.username.is_empty() {
        return Ok(User { uid: given.uid, gid: given.gid, additional_gids: given.additional_gids });
    }
    let mut user = lookup(&given.username, &read_small("/etc/passwd"), &read_small("/etc/group"))
        .ok_or_else(|| StepError::new("look up user", &given.username, Errno::EINVAL))?;
    user.additional_gids.extend(given.additional_gids);
    Ok(user)
}

/// At most a mebibyte of a file that belongs to the container, empty when it can't be read.
fn read_small(path: &str) -> String {
    let mut bytes = Vec::new();
    // Never wait for a FIFO that somebody put there.
    let file = open(path, OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC, Mode::empty());
    if let Ok(file) = file {
        drop(File::from(file).take(1 << 20).read_to_end(&mut bytes));
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Entries as fields.
fn entries(text: &str) -> impl Iterator<Item = Vec<&str>> {
    text.lines().map(|line| line.split(':').collect())
}

fn lookup(text: &str, passwd: &str, group: &str) -> Option<User> {
    let (name, group_name) = text.split_once(':').map_or((text, None), |(name, group)| (name, Some(group)));
    let by_name = entries(passwd).find(|fields| fields.len() > 3 && fields[0] == name);
    let number: Option<u32> = name.parse().ok();
    let by_number =
        |number: u32| entries(passwd).find(|fields| fields.len() > 3 && fields[2].parse() == Ok(number));
    let entry = by_name.or_else(|| number.and_then(by_number));
    let (uid, gid, known_as) = match &entry {
        Some(fields) => (fields[2].parse().ok()?, fields[3].parse().ok()?, fields[0]),
        None => (number?, 0, ""),
    };
    let Some(group_name) = group_name else {
        let is_member =
            |fields: &Vec<&str>| fields.len() > 3 && fields[3].split(',').any(|member| member == known_as);
        let additional_gids = entries(group)
            .filter(|fields| !known_as.is_empty() && is_member(fields))
            .filter_map(|fields| fields[2].parse().ok())
            .collect();
        return Some(User { uid, gid, additional_gids });
    };
    let by_name = entries(group).find(|fields| fields.len() > 2 && fields[0] == group_name);
    let gid = by_name.and_then(|fields| fields[2].parse().ok()).or_else(|| group_name.parse().ok())?;
    Some(User { uid, gid, additional_gids: Vec::new() })
}

/// Take the ids and give up every privilege that the process shall not have.
pub fn become_user(process: &grpc::Process, user: &User) -> Result<()> {
    let sets = process
        .capabilities
        .as_ref()
        .map(CapabilitySets::parse)
        .transpose()
        .map_err(|error| StepError::new("capabilities", error.to_string(), Errno::EINVAL))?;
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    if user.uid != 0 {
        give_stdio_to(uid)?;
    }
    if let Some(sets) = &sets {
        sets.drop_bounding().step("drop", "bounding capabilities")?;
    }
    prctl(libc::PR_SET_KEEPCAPS, 1, 0).step("keep", "capabilities")?;
    let groups: Vec<Gid> = user.additional_gids.iter().map(|gid| Gid::from_raw(*gid)).collect();
    setgroups(&groups).step("setgroups", "")?;
    setresgid(gid, gid, gid).step("setresgid", user.gid.to_string())?;
    setresuid(uid, uid, uid).step("setresuid", user.uid.to_string())?;
    prctl(libc::PR_SET_KEEPCAPS, 0, 0).step("keep", "capabilities")?;
    if let Some(sets) = &sets {
        sets.apply().step("set", "capabilities")?;
    }
    if process.no_new_privileges {
        prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0).step("set", "no_new_privs")?;
    }
    Ok(())
}

/// A process that is not root must be able to open `/dev/stdout` anew.
fn give_stdio_to(uid: Uid) -> Result<()> {
    for number in 0..3 {
        // SAFETY: descriptors 0 to 2 are open here and nothing closes them.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        let status = fstat(fd).step("stat", "stdio")?;
        let kind = SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT;
        let is_null = kind == SFlag::S_IFCHR && status.st_rdev == makedev(1, 3);
        if !is_null && status.st_uid != uid.as_raw() {
            match fchown(fd, Some(uid), None) {
                // Where owners can't be changed, having it open is enough.
                Ok(()) | Err(Errno::EINVAL | Errno::EPERM | Errno::EROFS) => {}
                Err(errno) => return Err(StepError::new("chown", "stdio", errno)),
            }
        }
    }
    Ok(())
}

/// The environment with `HOME` added: the user's home directory, else `/`.
pub fn environment(process: &grpc::Process, uid: u32) -> Vec<String> {
    let mut environment: Vec<String> =
        process.env.iter().filter(|entry| entry.find('=').is_some_and(|place| place > 0)).cloned().collect();
    if !environment.iter().any(|entry| entry.starts_with("HOME=")) {
        let passwd = read_small("/etc/passwd");
        let entry = entries(&passwd).find(|fields| fields.len() > 5 && fields[2].parse() == Ok(uid));
        let home = entry.map(|fields| fields[5]).filter(|home| !home.is_empty()).unwrap_or("/");
        environment.push(format!("HOME={home}"));
    }
    environment
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:34::/var/www:/bin/false\n";
    const GROUP: &str = "root:x:0:\nweb:x:34:\nlogs:x:40:other,web\nten:x:10:web\n";

    #[test]
    fn test_lookup_when_name_is_known_then_ids_and_groups() {
        let user = |uid, gid, groups: &[u32]| Some(User { uid, gid, additional_gids: groups.to_vec() });
        assert_eq!(lookup("web", PASSWD, GROUP), user(33, 34, &[40, 10]));
        assert_eq!(lookup("33", PASSWD, GROUP), user(33, 34, &[40, 10]));
        assert_eq!(lookup("web:logs", PASSWD, GROUP), user(33, 40, &[]));
        assert_eq!(lookup("web:7", PASSWD, GROUP), user(33, 7, &[]));
        assert_eq!(lookup("1234", PASSWD, GROUP), user(1234, 0, &[]));
    }

    #[test]
    fn test_lookup_when_name_is_unknown_then_none() {
        assert_eq!(lookup("nobody", PASSWD, GROUP), None);
        assert_eq!(lookup("web:nogroup", PASSWD, GROUP), None);
    }

    #[test]
    fn test_environment_when_home_is_given_then_kept_and_malformed_dropped() {
        let process =
            grpc::Process { env: vec!["HOME=/x".into(), "=y".into(), "z".into()], ..Default::default() };
        assert_eq!(environment(&process, 0), ["HOME=/x"]);
    }
}
