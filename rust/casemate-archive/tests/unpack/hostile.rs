//! What a hostile or damaged layer must not do.

use crate::support::{Scratch, Tar, digest, gzip};
use casemate_archive::{ArchiveError, Layer, Limits, unpack_layer};
use tar::EntryType;

fn refused(result: Result<u64, ArchiveError>) -> &'static str {
    match result {
        Err(ArchiveError::Refused { why, .. }) => why,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn test_unpack_when_name_climbs_then_refused() {
    for name in ["../outside/new", "a/../../outside/new", "/../outside/new", "..", "a/.."] {
        let scratch = Scratch::new();
        assert_eq!(refused(scratch.unpack(Tar::new().file(name, b"x"))), "its path has a `..`", "{name}");
        assert!(scratch.outside_is_untouched());
    }
}

#[test]
fn test_unpack_when_link_leads_outside_then_files_stay_inside() {
    for target in ["../outside", "../../../../../../../outside", "a/../../../outside"] {
        let scratch = Scratch::new();
        scratch.unpack(Tar::new().symlink("evil", target).file("evil/victim", b"x")).unwrap();
        assert!(scratch.outside_is_untouched(), "{target}");
        assert_eq!(scratch.read("outside/victim"), b"x");
    }
    let scratch = Scratch::new();
    let outside = scratch.outside().to_str().unwrap().to_owned();
    scratch.unpack(Tar::new().pax(&[("linkpath", outside.as_bytes())]).symlink("evil", "x")).unwrap();
    scratch
        .unpack(
            Tar::new().file("evil/victim", b"x").file("evil/.wh.victim", b"").file("evil/.wh..wh..opq", b""),
        )
        .unwrap();
    assert!(scratch.outside_is_untouched());
}

#[test]
fn test_unpack_when_link_has_the_name_of_a_file_then_it_is_replaced_not_followed() {
    let scratch = Scratch::new();
    scratch.unpack(Tar::new().symlink("file", "../outside/victim").file("file", b"x")).unwrap();
    assert!(scratch.outside_is_untouched());
    assert!(scratch.stat("file").is_file());
    scratch.unpack(Tar::new().symlink("file", "../outside/victim")).unwrap();
    scratch.unpack(Tar::new().member(EntryType::Directory, "file", 0o777, b"", |h| h.set_uid(5))).unwrap();
    assert!(scratch.outside_is_untouched() && scratch.stat("file").is_dir());
}

#[test]
fn test_unpack_when_hard_link_leads_outside_then_refused() {
    let scratch = Scratch::new();
    assert_eq!(
        refused(scratch.unpack(Tar::new().hard_link("x", "../outside/victim"))),
        "its path has a `..`"
    );
    let through_link = Tar::new().symlink("evil", "../outside").hard_link("x", "evil/victim");
    assert_eq!(refused(scratch.unpack(through_link)), "a hard link whose target does not exist");
    assert!(scratch.outside_is_untouched());
}

#[test]
fn test_unpack_when_hard_link_is_to_a_link_then_the_link_itself_is_linked() {
    let scratch = Scratch::new();
    scratch
        .unpack(Tar::new().symlink("evil", "../outside/victim").hard_link("x", "evil").file("x", b"y"))
        .unwrap();
    assert!(scratch.outside_is_untouched());
}

#[test]
fn test_unpack_when_hard_link_makes_no_sense_then_refused() {
    for (tar, why) in [
        (Tar::new().hard_link("x", "absent"), "a hard link whose target does not exist"),
        (Tar::new().directory("d").hard_link("x", "d"), "a hard link to a directory"),
        (Tar::new().file("x", b"").hard_link("x", "x"), "a hard link to itself"),
        (Tar::new().hard_link("x", "/"), "a hard link to the root directory"),
        (Tar::new().file("d/t", b"").hard_link("d", "d/t"), "a hard link whose target does not exist"),
    ] {
        assert_eq!(refused(Scratch::new().unpack(tar)), why);
    }
}

#[test]
fn test_unpack_when_whiteout_is_of_no_name_then_refused() {
    for name in [".wh.", ".wh..", ".wh...", "d/.wh..."] {
        let scratch = Scratch::new();
        scratch.unpack(Tar::new().file("a", b"")).unwrap();
        assert_eq!(refused(scratch.unpack(Tar::new().file(name, b""))), "a whiteout of no name", "{name}");
        assert!(scratch.outside_is_untouched() && scratch.exists("a"));
    }
}

#[test]
fn test_unpack_when_links_make_a_loop_then_refused() {
    let tar = Tar::new().symlink("a", "b").symlink("b", "a").file("a/x", b"");
    assert_eq!(refused(Scratch::new().unpack(tar)), "too many symbolic links on its path");
}

#[test]
fn test_unpack_when_parent_is_a_file_then_refused() {
    let tar = Tar::new().file("a", b"").file("a/x", b"");
    assert_eq!(refused(Scratch::new().unpack(tar)), "its parent is not a directory");
}

#[test]
fn test_unpack_when_root_is_replaced_then_refused() {
    for tar in [Tar::new().file("./", b""), Tar::new().symlink("/", "/etc"), Tar::new().file("", b"")] {
        // A V7 «file» whose name ends in a slash is a directory.
        match Scratch::new().unpack(tar) {
            Ok(_) => {}
            result => assert_eq!(refused(result), "it would replace the root directory"),
        }
    }
}

#[test]
fn test_unpack_when_tree_is_deeper_than_descriptors_then_removed_by_whiteout() {
    let scratch = Scratch::new();
    let deep = vec!["d"; 1700].join("/");
    scratch.unpack(Tar::new().pax(&[("path", deep.as_bytes())]).file("x", b"")).unwrap();
    scratch.unpack(Tar::new().file(".wh.d", b"")).unwrap();
    assert!(!scratch.exists("d"));
    let deeper = vec!["d"; 2000].join("/");
    let tar = Tar::new().pax(&[("path", deeper.as_bytes())]).file("x", b"");
    assert_eq!(refused(scratch.unpack(tar)), "its path is too long");
}

#[test]
fn test_unpack_when_cut_short_then_truncated() {
    let bytes = Tar::new().file("a", &vec![1; 5000]).file("b", b"x").bytes();
    for cut in [100, 512, 600, 5000, 512 + 5000 + 50, 512 + 5120 + 100] {
        let result = Scratch::new().unpack_bytes(&bytes[..cut]);
        assert!(matches!(result, Err(ArchiveError::Truncated { .. })), "{cut} {result:?}");
    }
    let incompressible: Vec<u8> =
        (0..200_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let bytes = Tar::new().file("a", &incompressible).bytes();
    for whole in [gzip(&bytes), zstd::encode_all(&bytes[..], 1).unwrap()] {
        for cut in [whole.len() / 2, whole.len() - 5] {
            let result = Scratch::new().unpack_bytes(&whole[..cut]);
            assert!(matches!(result, Err(ArchiveError::Truncated { .. })), "{cut} {result:?}");
        }
    }
}

#[test]
fn test_unpack_when_gzip_is_damaged_then_decode_error() {
    let mut data = gzip(&Tar::new().file("a", &vec![1; 5000]).bytes());
    let crc = data.len() - 8;
    data[crc] ^= 1;
    let result = Scratch::new().unpack_bytes(&data);
    assert!(matches!(result, Err(ArchiveError::Decode { format: "gzip", .. })), "{result:?}");
}

#[test]
fn test_unpack_when_digest_is_wrong_then_named() {
    let bytes = Tar::new().file("a", b"x").bytes();
    let zeros = format!("sha256:{}", "0".repeat(64));
    let result = Scratch::new().unpack_with(&bytes, &zeros, None, Limits::default());
    match result {
        Err(ArchiveError::Digest { what: "digest", expected, actual }) => {
            assert_eq!((expected, actual), (zeros.clone(), digest(&bytes)));
        }
        other => panic!("{other:?}"),
    }
    let packed = gzip(&bytes);
    let result = Scratch::new().unpack_with(&packed, &digest(&packed), Some(&zeros), Limits::default());
    assert!(matches!(result, Err(ArchiveError::Digest { what: "diff_id", .. })), "{result:?}");
}

#[test]
fn test_unpack_when_bytes_follow_the_end_mark_then_they_count_for_the_digest() {
    let mut bytes = Tar::new().file("a", b"x").bytes();
    let short = digest(&bytes);
    bytes.extend([0; 4096]);
    Scratch::new().unpack_bytes(&bytes).unwrap();
    let result = Scratch::new().unpack_with(&bytes, &short, None, Limits::default());
    assert!(matches!(result, Err(ArchiveError::Digest { .. })));
}

#[test]
fn test_unpack_when_beyond_limits_then_stopped() {
    let limits = Limits { max_bytes: 1 << 20, max_entries: 10 };
    let unpack = |data: &[u8]| Scratch::new().unpack_with(data, &digest(data), None, limits);

    let bomb = gzip(&Tar::new().file("a", &vec![0; 2 << 20]).bytes());
    assert!(matches!(unpack(&bomb), Err(ArchiveError::TooLarge { limit_bytes: 1_048_576 })));

    let holes = Tar::new()
        .pax(&[
            ("GNU.sparse.major", b"0"),
            ("GNU.sparse.realsize", b"9000000000000000000"),
            ("GNU.sparse.map", b"0,1"),
        ])
        .file("a", b"x")
        .bytes();
    assert!(matches!(unpack(&holes), Err(ArchiveError::TooLarge { .. })));

    let many = (0..11).fold(Tar::new(), |tar, i| tar.file(&i.to_string(), b"")).bytes();
    assert!(matches!(unpack(&many), Err(ArchiveError::TooManyEntries { limit: 10 })));

    let implied = Tar::new().file("1/2/3/4/5/6/7/8/9/10/11", b"").bytes();
    assert!(matches!(unpack(&implied), Err(ArchiveError::TooManyEntries { limit: 10 })));
}

#[test]
fn test_unpack_when_headers_lie_then_malformed() {
    let huge_extension =
        Tar::new().member(EntryType::XHeader, "pax", 0o644, b"", |header| header.set_size(1 << 40)).bytes();
    let owner = Tar::new().pax(&[("uid", b"4294967295")]).file("a", b"").bytes();
    let bad_sum = {
        let mut bytes = Tar::new().file("a", b"").bytes();
        bytes[0] = b'b';
        bytes
    };
    let unknown = Tar::new().member(EntryType::new(b'Z'), "a", 0o644, b"", |_| {}).bytes();
    for bytes in [huge_extension, owner, bad_sum, unknown, vec![b'x'; 4096]] {
        let result = Scratch::new().unpack_bytes(&bytes);
        assert!(matches!(result, Err(ArchiveError::Malformed { .. })), "{result:?}");
    }
    let dangling = {
        let mut bytes = Tar::new().pax(&[("path", b"x")]).bytes();
        bytes.truncate(1024);
        bytes
    };
    let result = Scratch::new().unpack_bytes(&dangling);
    assert!(matches!(result, Err(ArchiveError::Truncated { .. })), "{result:?}");
}

#[test]
fn test_unpack_when_device_number_is_out_of_range_then_refused() {
    let tar = Tar::new().member(EntryType::Char, "null", 0o666, b"", |header| {
        header.set_device_major(1 << 12).unwrap();
        header.set_device_minor(0).unwrap();
    });
    assert_eq!(refused(Scratch::new().unpack(tar)), "a device number out of range");
}

#[test]
fn test_unpack_when_form_is_not_read_here_then_unsupported() {
    for data in [&b"\xfd7zXZ\0..."[..], b"BZh9....", b"PK\x03\x04..."] {
        let result = Scratch::new().unpack_bytes(data);
        assert!(matches!(result, Err(ArchiveError::Unsupported { what: "compression", .. })));
    }
    let scratch = Scratch::new();
    let path = scratch.path("layer");
    std::fs::write(&path, b"").unwrap();
    let layer = Layer {
        path: &path,
        media_type: "application/vnd.oci.image.layer.nondistributable.v1.tar",
        digest: &digest(b""),
        diff_id: None,
    };
    let result = unpack_layer(&layer, &scratch.path(""), Limits::default(), &mut |_| true);
    assert!(matches!(result, Err(ArchiveError::Unsupported { what: "media type", .. })));
}

#[test]
fn test_unpack_when_layer_is_not_a_file_then_error_not_a_hang() {
    let scratch = Scratch::new();
    let fifo = scratch.top.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let zeros = format!("sha256:{}", "0".repeat(64));
    let layer = Layer { path: &fifo, media_type: "", digest: &zeros, diff_id: None };
    let result = unpack_layer(&layer, &scratch.path(""), Limits::default(), &mut |_| true);
    assert!(matches!(result, Err(ArchiveError::Unsupported { .. })), "{result:?}");
    let absent = scratch.top.path().join("absent");
    let layer = Layer { path: &absent, ..layer };
    let result = unpack_layer(&layer, &scratch.path(""), Limits::default(), &mut |_| true);
    assert!(matches!(result, Err(ArchiveError::Host { op: "open", errno: nix::errno::Errno::ENOENT, .. })));
}

#[test]
fn test_unpack_when_caller_stops_then_stopped() {
    let scratch = Scratch::new();
    let bytes = Tar::new().file("a", &vec![0; 1 << 20]).bytes();
    let path = scratch.top.path().join("layer");
    std::fs::write(&path, &bytes).unwrap();
    let layer = Layer { path: &path, media_type: "", digest: &digest(&bytes), diff_id: None };
    let result = unpack_layer(&layer, &scratch.path(""), Limits::default(), &mut |_| false);
    assert!(matches!(result, Err(ArchiveError::Stopped)), "{result:?}");
}
