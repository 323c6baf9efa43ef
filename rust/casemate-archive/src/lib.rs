//! Image layers onto a directory, and bounded decompression.
//!
//! [`unpack_layer`] applies one layer of an OCI or Docker image (a tar stream with whiteouts) onto a
//! directory: it reads the file once, checks its digest on the way, and never touches anything
//! outside that directory. It knows nothing of manifests, references or stores.
//!
//! Input is hostile: every length read from it is bounded before memory is taken, and paths are
//! walked one component at a time with symbolic links resolved as inside a chroot.

mod apply;
mod decompress;
mod error;
mod read;
mod stream;
mod tar;
mod tree;

use std::path::Path;

pub use decompress::{Format, decompress};
pub use error::ArchiveError;
pub use read::{read_file, remove_tree};
pub use stream::Progress;

/// What bounds one layer.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Uncompressed bytes: of the stream, and of all files together (holes of sparse files count).
    pub max_bytes: u64,
    /// Members of the archive, and directories made for them.
    pub max_entries: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_bytes: 64 << 30, max_entries: 2_000_000 }
    }
}

/// One layer's file and what it must be.
#[derive(Debug, Clone, Copy)]
pub struct Layer<'a> {
    /// Regular file that holds the layer.
    pub path: &'a Path,
    /// Media type from the manifest, or empty; the compression is told from the content.
    pub media_type: &'a str,
    /// `sha256:…` of the file as it is.
    pub digest: &'a str,
    /// `sha256:…` of the uncompressed tar stream, when known.
    pub diff_id: Option<&'a str>,
}

/// Apply `layer` onto `directory` and return its uncompressed size in bytes.
///
/// Whiteouts act on what was in `directory` before, never on members of the same layer. Owners, modes, times (also of
/// directories), extended attributes, hard links, device nodes, FIFOs and holes are kept. Not kept: `security.selinux`,
/// `trusted.overlay.*` and `user.overlay.*`, which describe the host the layer was made on.
///
/// A failed call leaves `directory` half changed: give it a directory that can be thrown away.
///
/// # Errors
/// [`ArchiveError`]: damage of any kind, a wrong digest, a member that would leave `directory`, a limit,
/// a failed system call, or a `progress` that answered false.
///
/// # Needs
/// `CAP_CHOWN`, `CAP_MKNOD`, `CAP_FOWNER`, `CAP_DAC_OVERRIDE`, `CAP_SETFCAP` and a mounted `/proc` for layers that use them.
///
/// # Source
/// OCI image specification, «Image Layer Filesystem Changeset».
pub fn unpack_layer(
    layer: &Layer<'_>,
    directory: &Path,
    limits: Limits,
    progress: Progress<'_>,
) -> Result<u64, ArchiveError> {
    casemate_failpoint::hit("native.unpack")?;
    let mut stream = stream::LayerStream::open(layer, limits, progress)?;
    let applied = {
        let mut reader = tar::TarReader::new(&mut stream);
        apply::apply(&mut reader, directory, limits)
    };
    match applied {
        Ok(()) => stream.finish(),
        // A stream that failed knows the cause better than the tar reader that ran dry.
        Err(error) => Err(stream.take_error().unwrap_or(error)),
    }
}
