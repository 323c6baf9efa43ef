//! Tap devices in a network namespace of the test's own.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::process::Command;

use casemate_netlink::{NetlinkError, TapOptions, create_tap};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};

/// An empty namespace, open; None (said why) where none can be made.
fn namespace() -> Option<File> {
    let made = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        File::open("/proc/thread-self/ns/net").map_err(|_| Errno::EIO)
    });
    match made.join().expect("no panic") {
        Ok(file) if File::open("/dev/net/tun").is_ok() => Some(file),
        other => {
            eprintln!("SKIPPED: needs root and /dev/net/tun ({other:?})");
            None
        }
    }
}

/// Names and flags that `ip` shows in the namespace.
fn links(namespace: &File) -> String {
    use std::os::fd::AsRawFd as _;
    let path = format!("--net=/proc/{}/fd/{}", std::process::id(), namespace.as_raw_fd());
    let shown = Command::new("nsenter").args([&path, "ip", "-o", "link"]).output().expect("runs");
    String::from_utf8(shown.stdout).expect("text")
}

#[test]
fn test_create_tap_when_a_pattern_is_given_then_lowest_free_number_and_gone_with_its_descriptor() {
    let Some(namespace) = namespace() else { return };
    let options = TapOptions::new(Some(namespace.as_fd()), None);
    let first = create_tap("cm%d", &options).expect("made");
    let second = create_tap("cm%d", &options).expect("made");
    assert_eq!((first.name.as_str(), second.name.as_str()), ("cm0", "cm1"));
    drop(first);
    let shown = links(&namespace);
    assert!(!shown.contains("cm0") && shown.contains("cm1") && shown.contains(",UP"), "{shown}");
    assert_eq!(create_tap("cm%d", &options).expect("made").name, "cm0");
}

#[test]
fn test_create_tap_when_owner_is_given_or_name_taken_then_as_asked_or_refused() {
    let Some(namespace) = namespace() else { return };
    let options = TapOptions::new(Some(namespace.as_fd()), Some(12345));
    let _tap = create_tap("cm7", &options).expect("made");
    let error = create_tap("cm7", &options).expect_err("taken");
    assert!(matches!(error, NetlinkError::System { errno: Errno::EBUSY, .. }), "{error}");
    assert!(error.to_string().starts_with("making the tap device cm7 failed"), "{error}");
    assert_eq!(links(&namespace).matches("cm").count(), 1);
}
