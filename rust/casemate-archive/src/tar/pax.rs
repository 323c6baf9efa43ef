//! PAX extension records: `<length> <key>=<value>\n`.

use super::Timestamp;

/// What a PAX header says of the next member.
#[derive(Debug, Default)]
pub(super) struct Pax {
    pub path: Option<Vec<u8>>,
    pub link: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub uid: Option<u64>,
    pub gid: Option<u64>,
    pub mtime: Option<Timestamp>,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub sparse: Sparse,
}

/// The `GNU.sparse.*` records of the three PAX ways to write holes.
#[derive(Debug, Default)]
pub(super) struct Sparse {
    pub version: Option<(u64, u64)>,
    pub name: Option<Vec<u8>>,
    pub real_size: Option<u64>,
    /// Offsets and lengths in turn (versions 0.0 and 0.1).
    pub map: Vec<u64>,
}

/// Records of one header; the error says what is wrong.
pub(super) fn parse(mut data: &[u8]) -> Result<Pax, &'static str> {
    const WRONG: &str = "an extension record";
    let mut pax = Pax::default();
    let mut version = (None, None);
    while !data.is_empty() {
        let space = data.iter().take(20).position(|byte| *byte == b' ').ok_or(WRONG)?;
        let length = usize::try_from(decimal(&data[..space])?).map_err(|_| WRONG)?;
        if length > data.len() || length < space + 3 || data[length - 1] != b'\n' {
            return Err(WRONG);
        }
        let record = &data[space + 1..length - 1];
        data = &data[length..];
        let equals = record.iter().position(|byte| *byte == b'=').ok_or(WRONG)?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        match key {
            b"path" => pax.path = Some(name(value)?),
            b"linkpath" => pax.link = Some(name(value)?),
            b"size" => pax.size = Some(decimal(value)?),
            b"uid" => pax.uid = Some(decimal(value)?),
            b"gid" => pax.gid = Some(decimal(value)?),
            b"mtime" => pax.mtime = Some(timestamp(value)?),
            b"GNU.sparse.major" => version.0 = Some(decimal(value)?),
            b"GNU.sparse.minor" => version.1 = Some(decimal(value)?),
            b"GNU.sparse.name" => pax.sparse.name = Some(name(value)?),
            b"GNU.sparse.realsize" | b"GNU.sparse.size" => pax.sparse.real_size = Some(decimal(value)?),
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => pax.sparse.map.push(decimal(value)?),
            b"GNU.sparse.map" => {
                pax.sparse.map = value.split(|byte| *byte == b',').map(decimal).collect::<Result<_, _>>()?;
            }
            _ => {
                if let Some(attribute) = key.strip_prefix(b"SCHILY.xattr.") {
                    pax.xattrs.push((name(attribute)?, value.to_vec()));
                }
            }
        }
    }
    pax.sparse.version = version.0.zip(version.1);
    Ok(pax)
}

fn name(value: &[u8]) -> Result<Vec<u8>, &'static str> {
    if value.contains(&0) { Err("a zero byte in a name") } else { Ok(value.to_vec()) }
}

/// A decimal number of at most 19 digits.
pub(super) fn decimal(text: &[u8]) -> Result<u64, &'static str> {
    const WRONG: &str = "a decimal number";
    if text.is_empty() || text.len() > 19 || !text.iter().all(u8::is_ascii_digit) {
        return Err(WRONG);
    }
    Ok(text.iter().fold(0, |value, digit| value * 10 + u64::from(digit - b'0')))
}

/// `[-]seconds[.fraction]`; digits after the ninth are dropped.
fn timestamp(text: &[u8]) -> Result<Timestamp, &'static str> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |byte| *byte == b'.');
    let seconds = decimal(parts.next().unwrap_or_default())?;
    let seconds = i64::try_from(seconds).map_err(|_| "a time")?;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err("a time");
    }
    let nanoseconds = fraction
        .iter()
        .chain(std::iter::repeat(&b'0'))
        .take(9)
        .fold(0, |value, digit| value * 10 + u32::from(digit - b'0'));
    Ok(match (negative, nanoseconds) {
        (false, _) => Timestamp { seconds, nanoseconds },
        (true, 0) => Timestamp { seconds: -seconds, nanoseconds: 0 },
        (true, _) => Timestamp { seconds: -seconds - 1, nanoseconds: 1_000_000_000 - nanoseconds },
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn test_parse_when_records_are_right_then_fields() {
        let pax = parse(b"12 path=abc\n18 mtime=-1.25000\n25 SCHILY.xattr.user.a=\0\n").unwrap();
        assert_eq!(pax.path.as_deref(), Some(&b"abc"[..]));
        assert_eq!(pax.mtime, Some(Timestamp { seconds: -2, nanoseconds: 750_000_000 }));
        assert_eq!(pax.xattrs, vec![(b"user.a".to_vec(), vec![0])]);
    }

    #[test]
    fn test_parse_when_record_is_wrong_then_error() {
        for data in [
            &b"12 path=abd"[..],
            b"99999999999999999999 a=b\n",
            b"3 a\n",
            b"0 a=b\n",
            b"6 abc\n",
            b"11 path=a\0\n",
            b"9 uid=-1\n",
            b"8 size=\n",
            b" 8 a=bc\n",
        ] {
            assert!(parse(data).is_err(), "{}", String::from_utf8_lossy(data));
        }
    }
}
