//! The line with which a program of the host asks for a guest port. No I/O.

/// Longest line accepted, its end included. `CONNECT 4294967295\r\n` has 20 bytes.
pub const MAX_LINE_BYTES: usize = 32;

/// What the bytes seen so far are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greeting {
    /// The beginning of a line that may still become right.
    Partial,
    /// A whole line.
    Connect {
        /// The guest port asked for.
        port: u32,
        /// Bytes of the line with its end; what follows belongs to the stream.
        line_bytes: usize,
    },
    /// Nothing that can become right.
    Malformed,
}

/// Judge the first bytes of a connection (at most [`MAX_LINE_BYTES`] are looked at).
#[must_use]
pub fn parse(bytes: &[u8]) -> Greeting {
    const WORD: &[u8] = b"CONNECT ";
    let window = &bytes[..bytes.len().min(MAX_LINE_BYTES)];
    let shared = window.len().min(WORD.len());
    if window[..shared] != WORD[..shared] {
        return Greeting::Malformed;
    }
    let Some(end) = window.iter().position(|byte| *byte == b'\n') else {
        return if window.len() < MAX_LINE_BYTES { Greeting::Partial } else { Greeting::Malformed };
    };
    let digits = window.get(WORD.len()..end).unwrap_or_default();
    let digits = digits.strip_suffix(b"\r").unwrap_or(digits);
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return Greeting::Malformed;
    }
    let value = digits
        .iter()
        .try_fold(0u32, |value, digit| value.checked_mul(10)?.checked_add(u32::from(digit - b'0')));
    match value {
        Some(port) => Greeting::Connect { port, line_bytes: end + 1 },
        None => Greeting::Malformed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn test_parse_when_line_is_whole_then_port_and_length_come_out() {
        assert_eq!(parse(b"CONNECT 1024\nhello"), Greeting::Connect { port: 1024, line_bytes: 13 });
        assert_eq!(parse(b"CONNECT 4294967295\r\n"), Greeting::Connect { port: u32::MAX, line_bytes: 20 });
    }

    #[test]
    fn test_parse_when_line_can_not_become_right_then_malformed() {
        let lines: [&[u8]; 8] = [
            b"connect 1\n",
            b"GET / HTTP/1.1\r\n",
            b"CONNECT \n",
            b"CONNECT 4294967296\n",
            b"CONNECT -1\n",
            b"CONNECT 1 2\n",
            b"CONNECT 00000000000000000000000001",
            b"\n",
        ];
        for line in lines {
            assert_eq!(parse(line), Greeting::Malformed, "{line:?}");
        }
    }

    #[test]
    fn test_parse_when_any_prefix_of_a_right_line_then_partial() {
        let line = b"CONNECT 1024\n";
        for end in 0..line.len() {
            assert_eq!(parse(&line[..end]), Greeting::Partial, "{end}");
        }
    }

    proptest! {
        #[test]
        fn test_parse_when_any_bytes_then_never_panics_and_length_holds(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Greeting::Connect { line_bytes, .. } = parse(&bytes) {
                prop_assert!(line_bytes <= MAX_LINE_BYTES && bytes[line_bytes - 1] == b'\n');
            }
        }

        #[test]
        fn test_parse_when_any_port_then_it_comes_back(port: u32) {
            let line = format!("CONNECT {port}\n");
            prop_assert_eq!(parse(line.as_bytes()), Greeting::Connect { port, line_bytes: line.len() });
        }
    }
}
