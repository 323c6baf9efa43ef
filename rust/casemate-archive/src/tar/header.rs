//! One 512-byte header block.

use super::BLOCK_BYTES;

/// What a member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    HardLink,
    SymbolicLink,
    CharacterDevice,
    BlockDevice,
    Directory,
    Fifo,
}

/// The type flag: a member, or something that describes the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flag {
    Member(Kind),
    OldSparse,
    LongName,
    LongLink,
    Pax,
    /// Global PAX header or volume label: read over, as other image tools do.
    Ignored,
}

/// A header's fields as they stand in the block.
#[derive(Debug)]
pub(super) struct Header {
    pub flag: Flag,
    pub name: Vec<u8>,
    pub link: Vec<u8>,
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    pub size: u64,
    pub mtime: i64,
    pub device: (u64, u64),
}

/// Parse a block that is not all zero. The error says what is wrong.
pub(super) fn parse(block: &[u8; BLOCK_BYTES]) -> Result<Header, &'static str> {
    check_sum(block)?;
    let posix = &block[257..263] == b"ustar\0";
    let gnu = &block[257..265] == b"ustar  \0";
    let mut name = text(&block[0..100]).to_vec();
    if posix {
        let prefix = text(&block[345..500]);
        if !prefix.is_empty() {
            name = [prefix, b"/", &name].concat();
        }
    }
    let flag = match block[156] {
        b'0' | 0 | b'7' if name.ends_with(b"/") => Flag::Member(Kind::Directory),
        b'0' | 0 | b'7' => Flag::Member(Kind::File),
        b'1' => Flag::Member(Kind::HardLink),
        b'2' => Flag::Member(Kind::SymbolicLink),
        b'3' => Flag::Member(Kind::CharacterDevice),
        b'4' => Flag::Member(Kind::BlockDevice),
        b'5' => Flag::Member(Kind::Directory),
        b'6' => Flag::Member(Kind::Fifo),
        b'S' if gnu => Flag::OldSparse,
        b'L' => Flag::LongName,
        b'K' => Flag::LongLink,
        b'x' => Flag::Pax,
        b'g' | b'V' => Flag::Ignored,
        _ => return Err("a member of unknown type"),
    };
    let device = match flag {
        Flag::Member(Kind::CharacterDevice | Kind::BlockDevice) => {
            (unsigned(&block[329..337])?, unsigned(&block[337..345])?)
        }
        _ => (0, 0),
    };
    Ok(Header {
        flag,
        name,
        link: text(&block[157..257]).to_vec(),
        mode: u32::try_from(number(&block[100..108])? & 0o7777).unwrap_or(0),
        uid: unsigned(&block[108..116])?,
        gid: unsigned(&block[116..124])?,
        size: unsigned(&block[124..136])?,
        mtime: number(&block[136..148])?,
        device,
    })
}

/// Up to the first zero byte.
pub(super) fn text(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or(field)
}

/// A number in octal, or in base 256 when the first bit is set; empty is 0.
pub(super) fn number(field: &[u8]) -> Result<i64, &'static str> {
    const WRONG: &str = "a number in a header";
    if field[0] & 0x80 != 0 {
        let negative = field[0] & 0x40 != 0;
        let first = i128::from(field[0] & 0x7f) - if negative { 0x80 } else { 0 };
        let mut value = first;
        for byte in &field[1..] {
            value = value.checked_mul(256).ok_or(WRONG)? + i128::from(*byte);
        }
        return i64::try_from(value).map_err(|_| WRONG);
    }
    let digits = text(field).trim_ascii();
    let mut value: i64 = 0;
    for digit in digits {
        if !(b'0'..=b'7').contains(digit) {
            return Err(WRONG);
        }
        value = value.checked_mul(8).ok_or(WRONG)? + i64::from(digit - b'0');
    }
    Ok(value)
}

pub(super) fn unsigned(field: &[u8]) -> Result<u64, &'static str> {
    u64::try_from(number(field)?).map_err(|_| "a negative number in a header")
}

/// Some old writers summed signed bytes: either sum will do.
fn check_sum(block: &[u8; BLOCK_BYTES]) -> Result<(), &'static str> {
    let wanted = number(&block[148..156])?;
    let counted = |i: usize| if (148..156).contains(&i) { b' ' } else { block[i] };
    let plain: i64 = (0..BLOCK_BYTES).map(|i| i64::from(counted(i))).sum();
    let signed: i64 = (0..BLOCK_BYTES).map(|i| i64::from(counted(i).cast_signed())).sum();
    if wanted == plain || wanted == signed { Ok(()) } else { Err("a header with a wrong checksum") }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn test_number_when_octal_or_base_256_then_value() {
        assert_eq!(number(b"0000644\0"), Ok(0o644));
        assert_eq!(number(b"   644 \0"), Ok(0o644));
        assert_eq!(number(&[0; 8]), Ok(0));
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 1, 0]), Ok(256));
        assert_eq!(number(&[0xff; 12]), Ok(-1));
    }

    #[test]
    fn test_number_when_not_a_number_then_error() {
        assert!(number(b"00x0644\0").is_err());
        assert!(number(&[0x80, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]).is_err());
        assert!(unsigned(&[0xff; 8]).is_err());
    }

    #[test]
    fn test_parse_when_checksum_is_wrong_then_error() {
        assert_eq!(parse(&[b'a'; BLOCK_BYTES]).err(), Some("a number in a header"));
        let mut block = [0; BLOCK_BYTES];
        block[0] = b'a';
        assert_eq!(parse(&block).err(), Some("a header with a wrong checksum"));
    }
}
