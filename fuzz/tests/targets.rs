//! Every target over its seeds, and over mutations of them: what a machine without libFuzzer can do.

use std::path::Path;

use casemate_fuzz::TARGETS;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestRunner};

fn seeds(name: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
    let mut paths: Vec<_> = std::fs::read_dir(&directory)
        .unwrap_or_else(|error| panic!("{}: {error}", directory.display()))
        .map(|entry| entry.expect("an entry").path())
        .collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).expect("read")).collect()
}

/// One change: of a byte, of the length, or a piece that is repeated elsewhere.
#[derive(Clone, Debug)]
enum Change {
    Byte(Index, u8),
    Cut(Index),
    Insert(Index, Vec<u8>),
    Repeat(Index, Index),
}

fn any_change() -> impl Strategy<Value = Change> {
    prop_oneof![
        4 => (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Change::Byte(at, byte)),
        1 => any::<Index>().prop_map(Change::Cut),
        1 => (any::<Index>(), prop::collection::vec(any::<u8>(), 1..20))
            .prop_map(|(at, bytes)| Change::Insert(at, bytes)),
        1 => (any::<Index>(), any::<Index>()).prop_map(|(from, to)| Change::Repeat(from, to)),
    ]
}

fn changed(seed: &[u8], changes: &[Change]) -> Vec<u8> {
    let mut data = seed.to_vec();
    for change in changes {
        if data.is_empty() {
            data.push(0);
        }
        match change {
            Change::Byte(at, byte) => {
                let at = at.index(data.len());
                data[at] = *byte;
            }
            Change::Cut(at) => data.truncate(at.index(data.len())),
            Change::Insert(at, bytes) => {
                let at = at.index(data.len());
                data.splice(at..at, bytes.iter().copied());
            }
            Change::Repeat(from, to) => {
                let (from, to) = (from.index(data.len()), to.index(data.len()));
                let piece: Vec<u8> = data[from..data.len().min(from + 64)].to_vec();
                data.splice(to..to, piece);
            }
        }
    }
    data
}

#[test]
fn target_when_run_on_its_seeds_then_no_promise_is_broken() {
    for (name, target) in TARGETS {
        let seeds = seeds(name);
        assert!(!seeds.is_empty(), "{name} has no seeds");
        seeds.iter().for_each(|seed| target(seed));
        target(b"");
    }
}

#[test]
fn target_when_run_on_changed_seeds_then_no_promise_is_broken() {
    for (name, target) in TARGETS {
        let seeds = seeds(name);
        let cases = if name == "layer" { 300 } else { 2000 };
        let mut runner = TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
        let input = (any::<Index>(), prop::collection::vec(any_change(), 1..6));
        runner
            .run(&input, |(seed, changes)| {
                target(&changed(&seeds[seed.index(seeds.len())], &changes));
                Ok(())
            })
            .unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}
