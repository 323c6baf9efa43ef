//! Members of a tar stream, one after the other.

use std::io::{self, Read};

use super::header::{self, Flag, Header, Kind};
use super::pax::{self, Pax};
use super::sparse::{self, Extent};
use super::{BLOCK_BYTES, Timestamp};
use crate::ArchiveError;

/// A PAX header with extended attributes of the kernel's greatest size fits.
const MAX_EXTENSION_BYTES: u64 = 1 << 20;

/// A member without its data.
#[derive(Debug)]
pub(crate) struct Entry {
    pub kind: Kind,
    pub path: Vec<u8>,
    pub link: Vec<u8>,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Timestamp,
    pub device: (u64, u64),
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Size of the file, holes included.
    pub size: u64,
    /// Where the data goes; one extent for a file without holes.
    pub extents: Vec<Extent>,
}

/// Reads headers, then the data of the member in between.
pub(crate) struct TarReader<R> {
    inner: R,
    offset: u64,
    data_left: u64,
    padding: u64,
}

impl<R: Read> TarReader<R> {
    pub(crate) fn new(inner: R) -> Self {
        Self { inner, offset: 0, data_left: 0, padding: 0 }
    }

    /// The next member; None at the end mark or where the stream ends between members.
    pub(crate) fn next_entry(&mut self) -> Result<Option<Entry>, ArchiveError> {
        let (mut long_name, mut long_link) = (None, None);
        let mut pax: Option<Pax> = None;
        loop {
            self.skip_data()?;
            let mut block = [0; BLOCK_BYTES];
            let pending = pax.is_some() || long_name.is_some() || long_link.is_some();
            let read = self.fill(&mut block)?;
            if read == 0 || (read == BLOCK_BYTES && block.iter().all(|byte| *byte == 0)) {
                if pending {
                    return Err(self.truncated("an extension header without its member"));
                }
                return Ok(None);
            }
            if read < BLOCK_BYTES {
                return Err(self.truncated("a header"));
            }
            let header = header::parse(&block).map_err(|what| self.malformed(what))?;
            match header.flag {
                Flag::LongName => long_name = Some(self.extension_name(header.size)?),
                Flag::LongLink => long_link = Some(self.extension_name(header.size)?),
                Flag::Pax => {
                    let data = self.extension(header.size)?;
                    pax = Some(pax::parse(&data).map_err(|what| self.malformed(what))?);
                }
                Flag::Ignored => self.set_data(header.size)?,
                Flag::Member(kind) => {
                    return self.member(header, kind, None, pax, long_name, long_link).map(Some);
                }
                Flag::OldSparse => {
                    return self
                        .member(header, Kind::File, Some(&block), pax, long_name, long_link)
                        .map(Some);
                }
            }
        }
    }

    /// Read data of the current member; 0 at its end.
    pub(crate) fn read_data(&mut self, buffer: &mut [u8]) -> Result<usize, ArchiveError> {
        let wanted = usize::try_from(self.data_left).unwrap_or(usize::MAX).min(buffer.len());
        let n = self.fill(&mut buffer[..wanted])?;
        self.data_left -= n as u64;
        if n < wanted {
            return Err(self.truncated("a member's data"));
        }
        Ok(n)
    }

    fn member(
        &mut self,
        header: Header,
        kind: Kind,
        old_sparse: Option<&[u8; BLOCK_BYTES]>,
        pax: Option<Pax>,
        long_name: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> Result<Entry, ArchiveError> {
        let pax = pax.unwrap_or_default();
        // Only files have data, whatever their headers say of a size.
        let stored = if kind == Kind::File { pax.size.unwrap_or(header.size) } else { 0 };
        self.set_data(stored)?;
        let (size, extents) = match old_sparse {
            Some(block) => self.old_sparse(block, stored)?,
            None if kind == Kind::File => self.pax_sparse(&pax, stored)?,
            None => (0, Vec::new()),
        };
        let narrow = |id: u64| u32::try_from(id).ok().filter(|id| *id != u32::MAX);
        let owner = narrow(pax.uid.unwrap_or(header.uid)).zip(narrow(pax.gid.unwrap_or(header.gid)));
        let (uid, gid) = owner.ok_or_else(|| self.malformed("an owner beyond 32 bits"))?;
        let mtime = pax.mtime.unwrap_or(Timestamp { seconds: header.mtime, nanoseconds: 0 });
        Ok(Entry {
            kind,
            path: pax.sparse.name.or(pax.path).or(long_name).unwrap_or(header.name),
            link: pax.link.or(long_link).unwrap_or(header.link),
            mode: header.mode,
            uid,
            gid,
            mtime,
            device: header.device,
            xattrs: pax.xattrs,
            size,
            extents,
        })
    }

    /// Old GNU form: four extents in the header, then blocks of 21.
    fn old_sparse(
        &mut self,
        block: &[u8; BLOCK_BYTES],
        stored: u64,
    ) -> Result<(u64, Vec<Extent>), ArchiveError> {
        let real_size = header::unsigned(&block[483..495]).map_err(|what| self.malformed(what))?;
        let mut numbers = Vec::new();
        self.collect(&block[386..482], &mut numbers)?;
        let mut more = block[482] != 0;
        while more {
            let mut next = [0; BLOCK_BYTES];
            // These blocks stand before the data and are not counted in its size.
            if self.fill(&mut next)? < BLOCK_BYTES {
                return Err(self.truncated("a map of holes"));
            }
            self.collect(&next[..504], &mut numbers)?;
            more = next[504] != 0;
        }
        let extents = sparse::pair(&numbers).and_then(|extents| sparse::check(extents, real_size, stored));
        Ok((real_size, extents.map_err(|what| self.malformed(what))?))
    }

    fn collect(&self, fields: &[u8], numbers: &mut Vec<u64>) -> Result<(), ArchiveError> {
        for pair in fields.chunks_exact(24) {
            if pair[0] == 0 {
                break;
            }
            if numbers.len() >= 2 * sparse::MAX_EXTENTS {
                return Err(self.malformed("a map of holes"));
            }
            for field in [&pair[..12], &pair[12..]] {
                numbers.push(header::unsigned(field).map_err(|what| self.malformed(what))?);
            }
        }
        Ok(())
    }

    /// PAX forms 0.0, 0.1 (map in the records) and 1.0 (map before the data); or no holes.
    fn pax_sparse(&mut self, pax: &Pax, stored: u64) -> Result<(u64, Vec<Extent>), ArchiveError> {
        let map = match pax.sparse.version {
            Some((1, 0)) => self.map_before_data()?,
            _ if !pax.sparse.map.is_empty() => pax.sparse.map.clone(),
            Some((0, _)) | None => return Ok((stored, vec![Extent { offset: 0, length: stored }])),
            Some(_) => return Err(self.malformed("an unknown form of holes")),
        };
        let real_size =
            pax.sparse.real_size.ok_or_else(|| self.malformed("a file with holes without size"))?;
        let extents =
            sparse::pair(&map).and_then(|extents| sparse::check(extents, real_size, self.data_left));
        Ok((real_size, extents.map_err(|what| self.malformed(what))?))
    }

    /// Lines with decimal numbers: how many extents, then offset and length of each; padded to a block.
    fn map_before_data(&mut self) -> Result<Vec<u64>, ArchiveError> {
        let mut numbers: Vec<u64> = Vec::new();
        let mut line: Vec<u8> = Vec::new();
        let mut wanted: Option<u64> = None;
        while wanted.is_none_or(|wanted| (numbers.len() as u64) < wanted) {
            let mut block = [0; BLOCK_BYTES];
            if self.read_data(&mut block)? < BLOCK_BYTES {
                return Err(self.truncated("a map of holes"));
            }
            for byte in block {
                if wanted.is_some_and(|wanted| numbers.len() as u64 == wanted) {
                    break;
                }
                if byte != b'\n' {
                    line.push(byte);
                    if line.len() > 20 {
                        return Err(self.malformed("a map of holes"));
                    }
                    continue;
                }
                let number = pax::decimal(&line).map_err(|what| self.malformed(what))?;
                line.clear();
                match wanted {
                    None if number > sparse::MAX_EXTENTS as u64 => {
                        return Err(self.malformed("a map of holes"));
                    }
                    None => wanted = Some(number * 2),
                    Some(_) => numbers.push(number),
                }
            }
        }
        Ok(numbers)
    }

    fn extension_name(&mut self, size: u64) -> Result<Vec<u8>, ArchiveError> {
        Ok(header::text(&self.extension(size)?).to_vec())
    }

    fn extension(&mut self, size: u64) -> Result<Vec<u8>, ArchiveError> {
        if size > MAX_EXTENSION_BYTES {
            return Err(self.malformed("an extension header of more than 1 MiB"));
        }
        self.set_data(size)?;
        let mut data = vec![0; usize::try_from(size).unwrap_or(0)];
        self.read_data(&mut data)?;
        Ok(data)
    }

    fn set_data(&mut self, size: u64) -> Result<(), ArchiveError> {
        let padded = size.checked_next_multiple_of(BLOCK_BYTES as u64);
        let padded = padded.ok_or_else(|| self.malformed("the size of a member"))?;
        self.data_left = size;
        self.padding = padded - size;
        Ok(())
    }

    fn skip_data(&mut self) -> Result<(), ArchiveError> {
        let mut buffer = [0; 16 * BLOCK_BYTES];
        while self.data_left > 0 {
            self.read_data(&mut buffer)?;
        }
        let padding = usize::try_from(self.padding).unwrap_or(0);
        self.padding = 0;
        if self.fill(&mut buffer[..padding])? < padding {
            return Err(self.truncated("the padding of a member"));
        }
        Ok(())
    }

    /// Fill `buffer`; fewer bytes only at the end of the stream.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, ArchiveError> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.inner.read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(ArchiveError::read(&error, "layer", "tar", self.offset)),
            }
        }
        self.offset += filled as u64;
        Ok(filled)
    }

    fn truncated(&self, what: &'static str) -> ArchiveError {
        ArchiveError::Truncated { offset: self.offset, what }
    }

    fn malformed(&self, what: &'static str) -> ArchiveError {
        ArchiveError::Malformed { offset: self.offset, what }
    }
}
