//! The rate of the host's time stamp counter, which an emulated guest sees as it is.

/// Kilohertz of the time stamp counter, measured against the raw monotonic clock; `None` on machines without one.
///
/// Blocks for about 2 ms, busy: it is over before a sleep would be. Exact to some 30 millionths.
#[must_use]
pub fn tsc_khz() -> Option<u64> {
    measure()
}

#[cfg(target_arch = "x86_64")]
fn measure() -> Option<u64> {
    const SPAN_NS: i128 = 2_000_000;
    let first = sample()?;
    let mut last = sample()?;
    while last.1 - first.1 < SPAN_NS {
        last = sample()?;
    }
    let ticks = last.0 - first.0;
    u64::try_from(ticks * 1_000_000 / (last.1 - first.1)).ok().filter(|khz| *khz > 0)
}

/// Counter and clock in nanoseconds at one moment: of several readings the one that was the least disturbed.
#[cfg(target_arch = "x86_64")]
fn sample() -> Option<(i128, i128)> {
    const TRIES: usize = 5;
    let mut best = (i128::MAX, 0, 0);
    for _ in 0..TRIES {
        let before = read_counter();
        let clock_ns = read_clock()?;
        let after = read_counter();
        if after - before < best.0 {
            best = (after - before, before + (after - before) / 2, clock_ns);
        }
    }
    Some((best.1, best.2))
}

#[cfg(target_arch = "x86_64")]
fn read_counter() -> i128 {
    // SAFETY: the instruction reads a counter and touches no memory; a kernel that forbids it to programs (PR_SET_TSC) does so
    // only for programs that ask.
    i128::from(unsafe { core::arch::x86_64::_rdtsc() })
}

#[cfg(target_arch = "x86_64")]
fn read_clock() -> Option<i128> {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC_RAW).ok()?;
    Some(i128::from(now.tv_sec()) * 1_000_000_000 + i128::from(now.tv_nsec()))
}

#[cfg(not(target_arch = "x86_64"))]
fn measure() -> Option<u64> {
    None
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn test_tsc_khz_measured_twice_agrees_within_a_thousandth() {
        let (first, second) = (tsc_khz().unwrap(), tsc_khz().unwrap());

        assert!(first.abs_diff(second) * 1000 < first, "{first} kHz, then {second} kHz");
        assert!((100_000..20_000_000).contains(&first), "{first} kHz");
    }
}
