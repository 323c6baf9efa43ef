//! Time marks of the guest's start, in nanoseconds since its boot.

use std::sync::{Mutex, PoisonError};

use nix::time::{ClockId, clock_gettime};

static MARKS: Mutex<Vec<(&'static str, u64)>> = Mutex::new(Vec::new());

/// Nanoseconds since the guest's boot.
pub fn boot_time_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME)
        .ok()
        .and_then(|time| u64::try_from(time.tv_sec() * 1_000_000_000 + time.tv_nsec()).ok())
        .unwrap_or(0)
}

/// Note that `step` has been reached. A later mark of the same name replaces the earlier one.
pub fn mark(step: &'static str) {
    let now = boot_time_ns();
    let mut marks = MARKS.lock().unwrap_or_else(PoisonError::into_inner);
    match marks.iter_mut().find(|(name, _)| *name == step) {
        Some(known) => known.1 = now,
        None => marks.push((step, now)),
    }
}

/// The marks as features of the agent: `casemate.boot_ns.<step>=<nanoseconds>`.
pub fn features() -> Vec<String> {
    let marks = MARKS.lock().unwrap_or_else(PoisonError::into_inner);
    marks.iter().map(|(step, ns)| format!("casemate.boot_ns.{step}={ns}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_mark_when_set_twice_then_one_feature_with_later_time() {
        mark("test_step");
        let before = boot_time_ns();
        mark("test_step");
        let found: Vec<String> =
            features().into_iter().filter(|text| text.starts_with("casemate.boot_ns.test_step=")).collect();
        assert_eq!(found.len(), 1);
        let ns: u64 = found[0].rsplit('=').next().and_then(|text| text.parse().ok()).expect("a number");
        assert!(ns >= before);
    }
}
