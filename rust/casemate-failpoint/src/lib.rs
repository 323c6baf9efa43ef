//! Points at which a native step can be made to fail, so that what is undone can be tested. Off unless armed.
//!
//! The grammar is read elsewhere, in one place (`casemate.observe.failpoints`); here are scripts that were read already.
//! With nothing armed a point costs one load of an atomic. A point must not stand where a lock is held that the thread
//! which disarms it could want: a delay sleeps in the calling thread.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Every point of the native parts.
pub const POINTS: [&str; 7] = [
    "native.spawn",
    "native.connect",
    "native.accept",
    "native.send",
    "native.recv",
    "native.unpack",
    "native.unpack_write",
];

/// What a point does when it is passed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Action {
    /// Nothing.
    Off,
    /// The step fails with this text.
    Error(String),
    /// The calling thread sleeps first.
    Delay(Duration),
    /// The step ends as an interrupted wait does.
    Cancel,
    /// SIGKILL for this process.
    Kill,
}

/// An action, and for how many hits (`None`: for all that follow).
pub type Term = (Option<u32>, Action);

/// What one point does, hit by hit: each term in turn, nothing behind the last.
#[derive(Debug)]
pub struct Script {
    terms: Mutex<std::collections::VecDeque<Term>>,
    hits: AtomicU64,
}

impl Script {
    /// A script of these terms.
    #[must_use]
    pub fn new(terms: impl IntoIterator<Item = Term>) -> Self {
        Self { terms: Mutex::new(terms.into_iter().collect()), hits: AtomicU64::new(0) }
    }

    /// How often the point was passed while the script was set.
    #[must_use]
    pub fn hits(&self) -> u64 {
        self.hits.load(Ordering::Relaxed)
    }

    fn next(&self) -> Action {
        self.hits.fetch_add(1, Ordering::Relaxed);
        let mut terms = self.terms.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some((left, action)) = terms.front_mut() {
            match left {
                None => return action.clone(),
                Some(0) => {
                    terms.pop_front();
                }
                Some(count) => {
                    *count -= 1;
                    return action.clone();
                }
            }
        }
        Action::Off
    }
}

/// The step was made to fail.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .text.as_deref().unwrap_or("interrupted"))]
pub struct Failure {
    /// The point.
    pub point: &'static str,
    /// The text of the error; `None`: it shall end as an interrupted wait does.
    pub text: Option<String>,
}

static IS_ARMED: AtomicBool = AtomicBool::new(false);
static SCRIPTS: RwLock<Option<HashMap<String, Arc<Script>>>> = RwLock::new(None);

/// Passes the point `name`.
///
/// # Errors
/// [`Failure`] when it is armed to fail.
#[inline]
pub fn hit(name: &'static str) -> Result<(), Failure> {
    if IS_ARMED.load(Ordering::Relaxed) { pass(name) } else { Ok(()) }
}

#[cold]
fn pass(name: &'static str) -> Result<(), Failure> {
    let script = {
        let scripts = SCRIPTS.read().unwrap_or_else(PoisonError::into_inner);
        scripts.as_ref().and_then(|scripts| scripts.get(name)).cloned()
    };
    match script.map_or(Action::Off, |script| script.next()) {
        Action::Off => Ok(()),
        Action::Error(text) => Err(Failure { point: name, text: Some(text) }),
        Action::Cancel => Err(Failure { point: name, text: None }),
        Action::Delay(time) => {
            std::thread::sleep(time);
            Ok(())
        }
        Action::Kill => {
            // A process can always kill itself; were it refused, the sleep shows it.
            let _ = kill(Pid::this(), Signal::SIGKILL);
            std::thread::sleep(Duration::from_secs(60));
            Ok(())
        }
    }
}

/// Sets these scripts in place of all that are set.
pub fn set(scripts: HashMap<String, Arc<Script>>) {
    let mut current = SCRIPTS.write().unwrap_or_else(PoisonError::into_inner);
    IS_ARMED.store(!scripts.is_empty(), Ordering::Relaxed);
    *current = Some(scripts);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// The table is the process's: one test at a time.
    static ONE: Mutex<()> = Mutex::new(());

    fn with<T>(terms: &[Term], work: impl FnOnce(&Script) -> T) -> T {
        let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let script = Arc::new(Script::new(terms.to_vec()));
        set(HashMap::from([("native.send".to_owned(), Arc::clone(&script))]));
        let result = work(&script);
        set(HashMap::new());
        result
    }

    #[test]
    fn hit_when_terms_are_counted_then_each_serves_its_hits_and_then_nothing_happens() {
        let terms =
            [(Some(1), Action::Off), (Some(2), Action::Error("full".into())), (Some(1), Action::Cancel)];
        let (texts, hits) = with(&terms, |script| {
            let texts: Vec<_> = (0..6).map(|_| hit("native.send").map_err(|failure| failure.text)).collect();
            (texts, script.hits())
        });
        let full = Err(Some("full".to_owned()));
        assert_eq!(texts, [Ok(()), full.clone(), full, Err(None), Ok(()), Ok(())]);
        assert_eq!(hits, 6);
    }

    #[test]
    fn hit_when_another_point_is_armed_or_none_then_nothing_happens() {
        let result = with(&[(None, Action::Error("no".into()))], |_| hit("native.recv"));
        assert_eq!(result, Ok(()));
        let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        assert_eq!(hit("native.send"), Ok(()));
    }

    #[test]
    fn hit_when_delayed_then_it_waits() {
        let started = std::time::Instant::now();
        with(&[(None, Action::Delay(Duration::from_millis(20)))], |_| hit("native.send")).unwrap();
        assert!(started.elapsed() >= Duration::from_millis(20));
    }
}
