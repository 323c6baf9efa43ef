//! The calls of the interoperability tests: one table for every client, outcomes as lines of JSON.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use casemate_ttrpc::{Call, Client, Code, TtrpcError};

use crate::{Failure, SERVICE};

/// What a call came to: code and text of its status (0: success), or the bytes of its answer's value.
#[derive(Default)]
pub struct Outcome {
    pub code: i32,
    pub text: String,
    pub value: Vec<u8>,
}

/// A request: service, method, value.
pub type Asked<'a> = (&'a str, &'a str, Vec<u8>);

/// A client under test.
pub trait Caller {
    /// Makes these calls at once and returns their outcomes in order.
    fn call(
        &mut self,
        asked: Vec<Asked<'_>>,
        timeout: Option<Duration>,
        metadata: &[(String, String)],
    ) -> Result<Vec<Outcome>, Failure>;
}

/// A message with one field of bytes, number 1, as `google.protobuf.BytesValue` has it.
pub fn wrap(value: &[u8]) -> Vec<u8> {
    if value.is_empty() {
        return Vec::new();
    }
    let mut message = vec![0x0a];
    let mut left = value.len();
    while left > 0x7f {
        message.push((left & 0x7f) as u8 | 0x80);
        left >>= 7;
    }
    message.push(left as u8);
    message.extend_from_slice(value);
    message
}

/// What [`wrap`] wrapped.
pub fn unwrap(message: &[u8]) -> Vec<u8> {
    let Some(from) = message.get(1..).and_then(|rest| rest.iter().position(|byte| *byte < 0x80)) else {
        return Vec::new();
    };
    message[from + 2..].to_vec()
}

fn tell(case: &str, code: i32, text: &str, size: usize) {
    // Texts of the tests have no character that JSON escapes but the quote.
    let text = text.replace('\\', "\\\\").replace('"', "\\\"");
    println!(r#"{{"case":"{case}","code":{code},"text":"{text}","size":{size}}}"#);
}

/// Makes every call and prints its outcome.
pub fn run(caller: &mut dyn Caller) -> Result<(), Failure> {
    let one = |caller: &mut dyn Caller, asked: Asked<'_>, timeout, metadata: &[(String, String)]| {
        caller.call(vec![asked], timeout, metadata).map(|mut outcomes| outcomes.remove(0))
    };
    for size in [0, 64, 64 << 10, 1 << 20, (4 << 20) - 64] {
        let value = vec![0; size];
        let outcome = one(caller, (SERVICE, "Echo", value.clone()), None, &[])?;
        let is_same = outcome.code != 0 || outcome.value == value;
        let code = if is_same { outcome.code } else { -1 };
        tell(&format!("echo_{size}"), code, &outcome.text, outcome.value.len());
    }
    for code in 1..=16 {
        let value = format!("{code} text of {code}").into_bytes();
        let outcome = one(caller, (SERVICE, "Fail", value), None, &[])?;
        tell(&format!("fail_{code}"), outcome.code, &outcome.text, 0);
    }
    let outcome = one(caller, (SERVICE, "Nope", Vec::new()), None, &[])?;
    tell("no_method", outcome.code, &outcome.text, 0);
    let outcome = one(caller, ("interop.Nope", "Echo", Vec::new()), None, &[])?;
    tell("no_service", outcome.code, &outcome.text, 0);
    let outcome = one(caller, (SERVICE, "Slow", Vec::new()), Some(Duration::from_millis(200)), &[])?;
    tell("late", outcome.code, "", 0);
    let trace = ["one", "two"].map(|value| ("trace".to_owned(), value.to_owned()));
    let outcome = one(caller, (SERVICE, "Metadata", Vec::new()), None, &trace)?;
    tell("metadata", outcome.code, &String::from_utf8(outcome.value)?, 0);
    let values: Vec<Vec<u8>> = (0..32u8).map(|number| vec![number; 1000 + usize::from(number)]).collect();
    let asked = values.iter().map(|value| (SERVICE, "Echo", value.clone())).collect();
    let outcomes = caller.call(asked, None, &[])?;
    let is_same = outcomes.iter().zip(&values).all(|(outcome, value)| outcome.value == *value);
    tell("at_once", if is_same { 0 } else { -1 }, "", outcomes.iter().map(|one| one.value.len()).sum());
    Ok(())
}

/// Our client.
pub struct Ours(Client);

impl Ours {
    /// Connects.
    pub fn connect(path: &str) -> Result<Self, Failure> {
        Ok(Self(Client::new(UnixStream::connect(path)?.into(), None)?))
    }
}

impl Caller for Ours {
    fn call(
        &mut self,
        asked: Vec<Asked<'_>>,
        timeout: Option<Duration>,
        metadata: &[(String, String)],
    ) -> Result<Vec<Outcome>, Failure> {
        let slots = asked
            .iter()
            .map(|(service, method, value)| {
                let payload = wrap(value);
                self.0.submit(&Call { service, method, payload: &payload, timeout, metadata })
            })
            .collect::<Result<Vec<_>, _>>()?;
        let outcome = |slot| match self.0.wait(slot) {
            Ok(answer) => Ok(Outcome { value: unwrap(&answer), ..Outcome::default() }),
            Err(TtrpcError::Rpc(status)) => {
                Ok(Outcome { code: status.code, text: status.message, value: Vec::new() })
            }
            Err(TtrpcError::DeadlineExceeded { .. }) => {
                Ok(Outcome { code: Code::DeadlineExceeded as i32, ..Outcome::default() })
            }
            Err(error) => Err(error.into()),
        };
        slots.into_iter().map(outcome).collect()
    }
}
