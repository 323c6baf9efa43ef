//! Layers made in memory by another tar writer, and a directory to unpack them in.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use casemate_archive::{ArchiveError, Layer, Limits, unpack_layer};
use sha2::{Digest, Sha256};
use tar::{EntryType, Header};

pub const TIME: u64 = 1_600_000_000;

/// A tar under construction.
pub struct Tar(tar::Builder<Vec<u8>>);

impl Tar {
    pub fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    fn header(kind: EntryType, name: &[u8], mode: u32) -> Header {
        let mut header = Header::new_gnu();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name);
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(TIME);
        header.set_size(0);
        header
    }

    /// A member whose header `change` may alter.
    pub fn member(
        mut self,
        kind: EntryType,
        name: &str,
        mode: u32,
        data: &[u8],
        change: impl FnOnce(&mut Header),
    ) -> Self {
        let mut header = Self::header(kind, name.as_bytes(), mode);
        header.set_size(data.len() as u64);
        change(&mut header);
        header.set_cksum();
        self.0.append(&header, data).unwrap();
        self
    }

    pub fn file(self, name: &str, data: &[u8]) -> Self {
        self.member(EntryType::Regular, name, 0o644, data, |_| {})
    }

    pub fn directory(self, name: &str) -> Self {
        self.member(EntryType::Directory, name, 0o755, b"", |_| {})
    }

    pub fn symlink(self, name: &str, target: &str) -> Self {
        self.link(EntryType::Symlink, name, target)
    }

    pub fn hard_link(self, name: &str, target: &str) -> Self {
        self.link(EntryType::Link, name, target)
    }

    fn link(self, kind: EntryType, name: &str, target: &str) -> Self {
        self.member(kind, name, 0o777, b"", |header| {
            header.as_mut_bytes()[157..157 + target.len()].copy_from_slice(target.as_bytes());
        })
    }

    /// A PAX header for the next member.
    pub fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut data = Vec::new();
        for (key, value) in records {
            let bare = key.len() + value.len() + 3;
            let mut length = bare + 1;
            while bare + length.to_string().len() != length {
                length = bare + length.to_string().len();
            }
            data.extend(format!("{length} {key}=").into_bytes());
            data.extend_from_slice(value);
            data.push(b'\n');
        }
        self.member(EntryType::XHeader, "pax", 0o644, &data, |_| {})
    }

    pub fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

pub fn digest(data: &[u8]) -> String {
    Sha256::digest(data).iter().fold("sha256:".to_owned(), |text, byte| format!("{text}{byte:02x}"))
}

pub fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// A scratch directory: `root` to unpack in, `outside` that nothing may touch.
pub struct Scratch {
    pub top: tempfile::TempDir,
}

impl Scratch {
    pub fn new() -> Self {
        let top = tempfile::tempdir().unwrap();
        fs::create_dir(top.path().join("root")).unwrap();
        fs::create_dir(top.path().join("outside")).unwrap();
        fs::write(top.path().join("outside/victim"), "untouched").unwrap();
        Self { top }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.top.path().join("root").join(name)
    }

    pub fn outside(&self) -> PathBuf {
        self.top.path().join("outside")
    }

    pub fn unpack_bytes(&self, data: &[u8]) -> Result<u64, ArchiveError> {
        self.unpack_with(data, &digest(data), None, Limits::default())
    }

    pub fn unpack_with(
        &self,
        data: &[u8],
        digest: &str,
        diff_id: Option<&str>,
        limits: Limits,
    ) -> Result<u64, ArchiveError> {
        let path = self.top.path().join("layer");
        fs::write(&path, data).unwrap();
        let layer = Layer { path: &path, media_type: "", digest, diff_id };
        unpack_layer(&layer, &self.path(""), limits, &mut |_| true)
    }

    pub fn unpack(&self, tar: Tar) -> Result<u64, ArchiveError> {
        self.unpack_bytes(&tar.bytes())
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    pub fn exists(&self, name: &str) -> bool {
        self.path(name).symlink_metadata().is_ok()
    }

    pub fn stat(&self, name: &str) -> fs::Metadata {
        self.path(name).symlink_metadata().unwrap()
    }

    /// Whether nothing beside `root` changed.
    pub fn outside_is_untouched(&self) -> bool {
        let names: Vec<_> = fs::read_dir(self.outside()).unwrap().map(|item| item.unwrap().path()).collect();
        let victim = self.outside().join("victim");
        names == [victim.clone()]
            && fs::read(&victim).unwrap() == b"untouched"
            && victim.metadata().unwrap().nlink() == 1
    }
}

/// An extended attribute; None when it is not there.
pub fn xattr(path: &Path, name: &str) -> Option<Vec<u8>> {
    use std::ffi::CString;
    use std::os::unix::ffi::OsStrExt;
    let (path, name) = (CString::new(path.as_os_str().as_bytes()).unwrap(), CString::new(name).unwrap());
    let mut value = vec![0_u8; 65536];
    // SAFETY: both strings end in a zero byte; the kernel writes at most `value.len()` bytes.
    let length =
        unsafe { libc::lgetxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    usize::try_from(length).ok().map(|length| value[..length].to_vec())
}
