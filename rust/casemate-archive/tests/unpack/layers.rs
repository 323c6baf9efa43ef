//! What a well-made layer leaves in the tree. Needs root (owners, device nodes, attributes).

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};

use crate::support::{Scratch, TIME, Tar, digest, gzip, xattr};
use tar::EntryType;

#[test]
fn test_unpack_when_layer_has_every_kind_then_tree_has_them() {
    let scratch = Scratch::new();
    let tar = Tar::new()
        .directory("./")
        .directory("etc/")
        .member(EntryType::Regular, "./etc/passwd", 0o640, b"root", |header| {
            header.set_uid(12);
            header.set_gid(34);
        })
        .member(EntryType::Regular, "/bin/su", 0o4755, b"elf", |_| {})
        .member(EntryType::Fifo, "run/fifo", 0o600, b"", |_| {})
        .member(EntryType::Char, "dev/null", 0o666, b"", |header| {
            header.set_device_major(1).unwrap();
            header.set_device_minor(3).unwrap();
        })
        .member(EntryType::Block, "dev/loop0", 0o660, b"", |header| {
            header.set_device_major(7).unwrap();
            header.set_device_minor(300).unwrap();
        })
        .symlink("etc/link", "../../verbatim//target")
        .hard_link("etc/passwd-", "/etc/passwd");
    let bytes = tar.bytes();
    assert_eq!(scratch.unpack_bytes(&bytes).unwrap(), bytes.len() as u64);

    let passwd = scratch.stat("etc/passwd");
    assert_eq!((passwd.uid(), passwd.gid(), passwd.mode() & 0o7777), (12, 34, 0o640));
    assert_eq!((passwd.nlink(), passwd.ino()), (2, scratch.stat("etc/passwd-").ino()));
    assert_eq!(scratch.stat("bin/su").mode() & 0o7777, 0o4755);
    assert!(scratch.stat("run/fifo").file_type().is_fifo());
    let null = scratch.stat("dev/null");
    assert!(null.file_type().is_char_device());
    assert_eq!((null.rdev(), null.mode() & 0o777), (libc::makedev(1, 3), 0o666));
    assert_eq!(scratch.stat("dev/loop0").rdev(), libc::makedev(7, 300));
    assert_eq!(fs::read_link(scratch.path("etc/link")).unwrap().to_str(), Some("../../verbatim//target"));
    for name in ["", "etc", "etc/passwd", "etc/link", "run/fifo", "dev/null"] {
        assert_eq!(scratch.stat(name).mtime(), TIME.cast_signed(), "{name}");
    }
    // Made without a member of their own.
    let run = scratch.stat("run");
    assert_eq!((run.mode() & 0o7777, run.uid(), run.mtime()), (0o755, 0, 0));
}

#[test]
fn test_unpack_when_pax_headers_then_names_times_owners_and_attributes() {
    let scratch = Scratch::new();
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(255));
    let capability = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    scratch
        .unpack(
            Tar::new()
                .pax(&[
                    ("path", long.as_bytes()),
                    ("mtime", b"-1.5"),
                    ("uid", b"3000000000"),
                    ("SCHILY.xattr.user.note", b"a=b\nc"),
                    ("SCHILY.xattr.security.capability", capability),
                    ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
                    ("SCHILY.xattr.security.selinux", b"label"),
                ])
                .file("short", b"data")
                .file("plain", b""),
        )
        .unwrap();
    let stat = scratch.stat(&long);
    assert_eq!((stat.mtime(), stat.mtime_nsec(), stat.uid()), (-2, 500_000_000, 3_000_000_000));
    let path = scratch.path(&long);
    assert_eq!(xattr(&path, "user.note").as_deref(), Some(&b"a=b\nc"[..]));
    assert_eq!(xattr(&path, "security.capability").as_deref(), Some(&capability[..]));
    assert_eq!(xattr(&path, "trusted.overlay.opaque"), None);
    assert_eq!(xattr(&path, "security.selinux"), None);
    assert_eq!(xattr(&scratch.path("plain"), "user.note"), None);
}

#[test]
fn test_unpack_when_gnu_long_names_then_whole() {
    let scratch = Scratch::new();
    let long = format!("{}/{}", "a".repeat(150), "b".repeat(150));
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(EntryType::Symlink);
    header.set_size(0);
    header.set_mode(0o777);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(TIME);
    builder.append_link(&mut header, &long, &long).unwrap();
    scratch.unpack_bytes(&builder.into_inner().unwrap()).unwrap();
    assert_eq!(fs::read_link(scratch.path(&long)).unwrap().to_str(), Some(&long[..]));
}

#[test]
fn test_unpack_when_whiteouts_then_lower_files_go() {
    let scratch = Scratch::new();
    scratch
        .unpack(Tar::new().file("a/gone", b"").file("a/kept", b"").file("tree/x/y", b"").file("solo", b""))
        .unwrap();
    scratch
        .unpack(Tar::new().file("a/.wh.gone", b"").file(".wh.tree", b"").file("b/.wh.never", b""))
        .unwrap();
    assert!(!scratch.exists("a/gone") && scratch.exists("a/kept") && scratch.exists("solo"));
    assert!(!scratch.exists("tree") && !scratch.exists("a/.wh.gone"));
    assert!(scratch.stat("b").is_dir());
}

#[test]
fn test_unpack_when_whiteout_comes_with_the_same_name_then_the_new_one_stays() {
    for swap in [false, true] {
        let scratch = Scratch::new();
        scratch.unpack(Tar::new().file("file", b"old").file("dir/old", b"")).unwrap();
        let upper = if swap {
            Tar::new().file("file", b"new").file("dir/new", b"").file(".wh.file", b"").file(".wh.dir", b"")
        } else {
            Tar::new().file(".wh.file", b"").file(".wh.dir", b"").file("file", b"new").file("dir/new", b"")
        };
        scratch.unpack(upper).unwrap();
        assert_eq!(scratch.read("file"), b"new");
        assert!(scratch.exists("dir/new") && !scratch.exists("dir/old"), "swap {swap}");
    }
}

#[test]
fn test_unpack_when_opaque_then_only_lower_content_goes() {
    for opaque_first in [false, true] {
        let scratch = Scratch::new();
        scratch
            .unpack(
                Tar::new()
                    .file("d/old", b"")
                    .file("d/sub/old", b"")
                    .file("d/other/old", b"")
                    .file("beside", b""),
            )
            .unwrap();
        let mut upper = Tar::new();
        if opaque_first {
            upper = upper.file("d/.wh..wh..opq", b"");
        }
        upper = upper.file("d/new", b"").file("d/sub/new", b"");
        if !opaque_first {
            upper = upper.file("d/.wh..wh..opq", b"");
        }
        scratch.unpack(upper).unwrap();
        assert!(scratch.exists("d/new") && scratch.exists("d/sub/new") && scratch.exists("beside"));
        assert!(!scratch.exists("d/old") && !scratch.exists("d/sub/old") && !scratch.exists("d/other"));
        assert!(!scratch.exists("d/.wh..wh..opq"));
    }
}

#[test]
fn test_unpack_when_opaque_hides_a_file_linked_by_this_layer_then_the_link_stays() {
    let scratch = Scratch::new();
    scratch.unpack(Tar::new().file("lower/a", b"data")).unwrap();
    scratch.unpack(Tar::new().hard_link("upper/b", "lower/a").file("lower/.wh..wh..opq", b"")).unwrap();
    assert!(!scratch.exists("lower/a"));
    assert_eq!(scratch.read("upper/b"), b"data");
}

#[test]
fn test_unpack_when_hard_link_crosses_layers_then_same_inode() {
    let scratch = Scratch::new();
    scratch.unpack(Tar::new().file("usr/lib/x", b"data").symlink("lib", "/usr/lib")).unwrap();
    scratch.unpack(Tar::new().hard_link("copy", "lib/x")).unwrap();
    assert_eq!(scratch.stat("copy").ino(), scratch.stat("usr/lib/x").ino());
}

#[test]
fn test_unpack_when_file_is_replaced_then_its_other_links_keep_the_old_data() {
    let scratch = Scratch::new();
    scratch.unpack(Tar::new().file("a", b"old").hard_link("b", "a")).unwrap();
    scratch.unpack(Tar::new().file("a", b"new")).unwrap();
    assert_eq!((scratch.read("a"), scratch.read("b")), (b"new".to_vec(), b"old".to_vec()));
}

#[test]
fn test_unpack_when_kinds_are_swapped_then_the_upper_wins() {
    let scratch = Scratch::new();
    scratch
        .unpack(
            Tar::new().file("dir/x/y", b"").file("file", b"f").symlink("link", "/dir").file("keep/x", b""),
        )
        .unwrap();
    scratch
        .unpack(
            Tar::new()
                .file("dir", b"now a file")
                .directory("file")
                .file("file/in", b"")
                .directory("link")
                .file("link/in", b"")
                .directory("keep"),
        )
        .unwrap();
    assert_eq!(scratch.read("dir"), b"now a file");
    assert!(scratch.stat("link").is_dir());
    for name in ["file/in", "link/in", "keep/x"] {
        assert!(scratch.exists(name), "{name}");
    }
}

#[test]
fn test_unpack_when_directory_is_given_again_then_metadata_is_the_upper_ones() {
    let scratch = Scratch::new();
    let directory = |tar: Tar, mode, uid| {
        tar.member(EntryType::Directory, "d", mode, b"", move |header| header.set_uid(uid))
    };
    scratch.unpack(directory(Tar::new().pax(&[("SCHILY.xattr.user.old", b"1")]), 0o700, 1)).unwrap();
    scratch.unpack(directory(Tar::new().pax(&[("SCHILY.xattr.user.new", b"2")]), 0o1777, 2)).unwrap();
    assert_eq!((scratch.stat("d").mode() & 0o7777, scratch.stat("d").uid()), (0o1777, 2));
    assert_eq!(xattr(&scratch.path("d"), "user.old"), None);
    assert_eq!(xattr(&scratch.path("d"), "user.new").as_deref(), Some(&b"2"[..]));
}

#[test]
fn test_unpack_when_upper_changes_lower_directories_then_their_times_stay() {
    let scratch = Scratch::new();
    scratch.unpack(Tar::new().directory("./").directory("d").directory("d/e").file("d/e/f", b"")).unwrap();
    scratch.unpack(Tar::new().file("d/e/g", b"").file("d/e/.wh.f", b"").file("top", b"")).unwrap();
    for name in ["", "d", "d/e"] {
        assert_eq!(scratch.stat(name).mtime(), TIME.cast_signed(), "{name}");
    }
}

#[test]
fn test_unpack_when_parent_is_a_link_then_files_go_where_it_leads_inside() {
    let scratch = Scratch::new();
    scratch
        .unpack(Tar::new().directory("usr/lib").symlink("lib", "usr/lib").symlink("run", "/var/run"))
        .unwrap();
    scratch.unpack(Tar::new().file("lib/a", b"").file("run/b", b"")).unwrap();
    assert!(scratch.exists("usr/lib/a") && scratch.exists("var/run/b"));
    assert!(scratch.stat("lib").file_type().is_symlink());
}

#[test]
fn test_unpack_when_file_has_holes_then_they_stay_holes() {
    let megabyte = 1_u64 << 20;
    let map = format!("2\n{megabyte}\n4\n{}\n0\n", 8 * megabyte);
    let mut version_1 = map.into_bytes();
    version_1.resize(512, 0);
    version_1.extend(b"DATA");
    let real_size = (8 * megabyte).to_string();
    let offset = format!("{megabyte},4,{real_size},0");
    let old = |header: &mut tar::Header| {
        let gnu = header.as_gnu_mut().unwrap();
        gnu.sparse[0].set_offset(megabyte);
        gnu.sparse[0].set_length(4);
        gnu.sparse[1].set_offset(8 * megabyte);
        gnu.sparse[1].set_length(0);
        gnu.set_real_size(8 * megabyte);
    };
    let tars = [
        Tar::new().member(EntryType::GNUSparse, "holes", 0o644, b"DATA", old),
        Tar::new()
            .pax(&[
                ("GNU.sparse.major", b"0"),
                ("GNU.sparse.minor", b"1"),
                ("GNU.sparse.name", b"holes"),
                ("GNU.sparse.size", real_size.as_bytes()),
                ("GNU.sparse.map", offset.as_bytes()),
            ])
            .file("GNUSparseFile.1/holes", b"DATA"),
        Tar::new()
            .pax(&[
                ("GNU.sparse.major", b"1"),
                ("GNU.sparse.minor", b"0"),
                ("GNU.sparse.name", b"holes"),
                ("GNU.sparse.realsize", real_size.as_bytes()),
            ])
            .file("GNUSparseFile.1/holes", &version_1),
    ];
    for tar in tars {
        let scratch = Scratch::new();
        scratch.unpack(tar).unwrap();
        let data = scratch.read("holes");
        assert_eq!(data.len() as u64, 8 * megabyte);
        assert_eq!(&data[1 << 20..(1 << 20) + 4], b"DATA");
        assert_eq!(data.iter().filter(|byte| **byte != 0).count(), 4);
        assert!(scratch.stat("holes").blocks() < 64, "{}", scratch.stat("holes").blocks());
    }
}

#[test]
fn test_unpack_when_compressed_then_the_same_tree_and_size() {
    let bytes = Tar::new().file("a", &vec![7; 300_000]).bytes();
    let two_members = [gzip(&bytes[..1000]), gzip(&bytes[1000..])].concat();
    for data in [bytes.clone(), gzip(&bytes), two_members, zstd::encode_all(&bytes[..], 3).unwrap()] {
        let scratch = Scratch::new();
        let diff_id = digest(&bytes);
        let size =
            scratch.unpack_with(&data, &digest(&data), Some(&diff_id), casemate_archive::Limits::default());
        assert_eq!(size.unwrap(), bytes.len() as u64);
        assert_eq!(scratch.read("a"), vec![7; 300_000]);
    }
}

#[test]
fn test_unpack_when_umask_is_strict_then_modes_are_the_layers() {
    // The mask belongs to the whole process: the other tests must not care either.
    let old = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    let scratch = Scratch::new();
    let result = scratch.unpack(Tar::new().file("implied/file", b"").directory("given"));
    nix::sys::stat::umask(old);
    result.unwrap();
    for (name, mode) in [("implied", 0o755), ("implied/file", 0o644), ("given", 0o755)] {
        assert_eq!(scratch.stat(name).permissions().mode() & 0o7777, mode, "{name}");
    }
}
