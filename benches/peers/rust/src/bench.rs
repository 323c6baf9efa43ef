//! The benchmark's lines: `run N SIZE WINDOW` on standard input is answered by processor nanoseconds of this process, then N
//! times in nanoseconds, each a window's time by its size.

use std::io::BufRead;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};

use crate::Failure;

/// A client under measurement.
pub trait Client {
    /// Makes `window` calls at once with a payload of `size` bytes and returns when all are answered.
    fn calls(&mut self, window: usize, size: usize) -> Result<(), Failure>;
}

fn cpu() -> Result<Duration, Failure> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let time = |value: nix::sys::time::TimeVal| {
        Duration::from_micros(value.tv_sec() as u64 * 1_000_000 + value.tv_usec() as u64)
    };
    Ok(time(usage.user_time()) + time(usage.system_time()))
}

/// Answers the lines until standard input ends.
pub fn run(client: &mut dyn Client) -> Result<(), Failure> {
    println!("ready");
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let mut words = line.split(' ').skip(1).map(str::parse::<usize>);
        let mut word = || words.next().ok_or("run N SIZE WINDOW is expected");
        let (count, size, window) = (word()??, word()??, word()??);
        let before = cpu()?;
        let mut times = Vec::with_capacity(count);
        for _ in 0..count {
            let started = Instant::now();
            client.calls(window, size)?;
            times.push(started.elapsed().as_nanos() / window as u128);
        }
        let spent = cpu()? - before;
        let texts: Vec<String> = times.iter().map(ToString::to_string).collect();
        println!("{} {}", spent.as_nanos(), texts.join(" "));
    }
    Ok(())
}
