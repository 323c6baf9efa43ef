//! Which requests of one connection wait for which earlier ones.
//!
//! Life-cycle requests run one after the other in the order they came. A request about a process waits for the earlier
//! requests that make this process, so that a caller can send creation, start and the first reads in one write. Pure: it
//! holds requests of any type and says which may run.

use std::collections::VecDeque;

/// What a request is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Class {
    /// CreateSandbox, DestroySandbox.
    Sandbox,
    /// CreateContainer.
    Create(String),
    /// StartContainer.
    Start(String),
    /// RemoveContainer.
    Remove(String),
    /// ExecProcess: container and process.
    Exec(String, String),
    /// Another request about an existing container: statistics, pause, update.
    Side(String),
    /// A request about a process: container and process; empty or the container's id for its first process.
    Process(String, String),
    /// As `Process`, for requests that only a started process can serve.
    StartedProcess(String, String),
}

impl Class {
    fn is_life_cycle(&self) -> bool {
        matches!(self, Self::Sandbox | Self::Create(_) | Self::Start(_) | Self::Remove(_))
    }

    /// Requests that are not noted while they run: nothing waits for them.
    fn is_untracked(&self) -> bool {
        matches!(self, Self::Process(..) | Self::StartedProcess(..))
    }

    fn waits_for(&self, earlier: &Self) -> bool {
        use Class::{Create, Exec, Process, Remove, Sandbox, Side, Start, StartedProcess};
        match (self, earlier) {
            (later, earlier) if later.is_life_cycle() && earlier.is_life_cycle() => true,
            (Sandbox, Exec(..) | Side(_)) => true,
            (Remove(id), Exec(of, _) | Side(of)) => id == of,
            (Exec(id, _) | Side(id), Create(of) | Start(of) | Remove(of)) => id == of,
            (Exec(id, exec), Exec(of, other)) => id == of && exec == other,
            (Process(id, _) | StartedProcess(id, _), Create(of)) => id == of,
            (StartedProcess(id, _), Start(of)) => id == of,
            (Process(id, exec) | StartedProcess(id, exec), Exec(of, other)) => id == of && exec == other,
            _ => false,
        }
    }
}

/// Names a request that runs, for [`Ordering::finish`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket(u64);

#[derive(Debug)]
struct Entry<T> {
    ticket: Ticket,
    class: Class,
    held: Option<T>,
}

/// What may run now that a request is over.
#[derive(Debug, PartialEq, Eq)]
pub enum Released<T> {
    /// Untracked requests, in order; run them and call [`Ordering::finish`] again: those that come meanwhile queue behind.
    Untracked(Vec<T>),
    /// Tracked requests, to be finished in turn; the finished one is forgotten.
    Tracked(Vec<(Ticket, T)>),
}

/// The requests of one connection that run or wait, in the order they came.
#[derive(Debug)]
pub struct Ordering<T> {
    entries: VecDeque<Entry<T>>,
    next_ticket: u64,
}

/// Answer to [`Ordering::submit`].
#[derive(Debug, PartialEq, Eq)]
pub enum Submitted<T> {
    /// Run it; nothing need be told afterwards.
    Run(T),
    /// Run it, then call [`Ordering::finish`].
    RunTracked(Ticket, T),
    /// It is kept until earlier ones are over.
    Held,
}

impl<T> Ordering<T> {
    /// Nothing runs, nothing waits.
    pub fn new() -> Self {
        Self { entries: VecDeque::new(), next_ticket: 0 }
    }

    /// Take a request.
    pub fn submit(&mut self, class: Class, request: T) -> Submitted<T> {
        let must_wait = self.entries.iter().any(|entry| class.waits_for(&entry.class));
        if !must_wait && class.is_untracked() {
            return Submitted::Run(request);
        }
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        if must_wait {
            self.entries.push_back(Entry { ticket, class, held: Some(request) });
            return Submitted::Held;
        }
        self.entries.push_back(Entry { ticket, class, held: None });
        Submitted::RunTracked(ticket, request)
    }

    /// A tracked request is over.
    pub fn finish(&mut self, ticket: Ticket) -> Released<T> {
        let untracked = self.take_untracked_that_wait_only_for(ticket);
        if !untracked.is_empty() {
            return Released::Untracked(untracked);
        }
        self.entries.retain(|entry| entry.ticket != ticket);
        let mut runnable = Vec::new();
        for index in 0..self.entries.len() {
            let entry = &self.entries[index];
            let is_free = !self.entries.range(..index).any(|earlier| entry.class.waits_for(&earlier.class));
            if entry.held.is_some() && is_free {
                let ticket = entry.ticket;
                if let Some(request) = self.entries[index].held.take() {
                    runnable.push((ticket, request));
                }
            }
        }
        Released::Tracked(runnable)
    }

    fn take_untracked_that_wait_only_for(&mut self, ticket: Ticket) -> Vec<T> {
        let mut taken = Vec::new();
        let mut index = 0;
        while index < self.entries.len() {
            let entry = &self.entries[index];
            let waits_for_another = self
                .entries
                .range(..index)
                .any(|earlier| earlier.ticket != ticket && entry.class.waits_for(&earlier.class));
            if entry.class.is_untracked() && !waits_for_another {
                taken.extend(self.entries.remove(index).and_then(|entry| entry.held));
            } else {
                index += 1;
            }
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn create(id: &str) -> Class {
        Class::Create(id.into())
    }

    fn read(id: &str) -> Class {
        Class::Process(id.into(), id.into())
    }

    fn ticket_of(submitted: Submitted<u32>) -> Ticket {
        match submitted {
            Submitted::RunTracked(ticket, _) => ticket,
            other => panic!("does not run: {other:?}"),
        }
    }

    #[test]
    fn test_submit_when_life_cycle_requests_come_together_then_one_after_the_other() {
        let mut ordering = Ordering::new();
        let sandbox = ticket_of(ordering.submit(Class::Sandbox, 1));
        assert_eq!(ordering.submit(create("a"), 2), Submitted::Held);
        assert_eq!(ordering.submit(Class::Start("a".into()), 3), Submitted::Held);
        let Released::Tracked(next) = ordering.finish(sandbox) else { panic!("tracked") };
        assert_eq!(next.iter().map(|(_, request)| *request).collect::<Vec<_>>(), [2]);
        let Released::Tracked(next) = ordering.finish(next[0].0) else { panic!("tracked") };
        assert_eq!(next.iter().map(|(_, request)| *request).collect::<Vec<_>>(), [3]);
    }

    #[test]
    fn test_submit_when_process_is_being_made_then_its_requests_wait_in_order() {
        let mut ordering = Ordering::new();
        let creation = ticket_of(ordering.submit(create("a"), 1));
        assert_eq!(ordering.submit(read("a"), 2), Submitted::Held);
        assert_eq!(ordering.submit(read("a"), 3), Submitted::Held);
        assert_eq!(ordering.submit(read("b"), 4), Submitted::Run(4));
        assert_eq!(ordering.finish(creation), Released::Untracked(vec![2, 3]));
        // One that comes while the first are being run still queues behind them.
        assert_eq!(ordering.submit(read("a"), 5), Submitted::Held);
        assert_eq!(ordering.finish(creation), Released::Untracked(vec![5]));
        assert_eq!(ordering.finish(creation), Released::Tracked(vec![]));
        assert_eq!(ordering.submit(read("a"), 6), Submitted::Run(6));
    }

    #[test]
    fn test_submit_when_start_is_pending_then_reads_run_and_signals_wait() {
        let mut ordering = Ordering::new();
        let start = ticket_of(ordering.submit(Class::Start("a".into()), 1));
        assert_eq!(ordering.submit(read("a"), 2), Submitted::Run(2));
        assert_eq!(ordering.submit(Class::StartedProcess("a".into(), String::new()), 3), Submitted::Held);
        assert_eq!(ordering.finish(start), Released::Untracked(vec![3]));
    }

    #[test]
    fn test_submit_when_exec_is_pending_then_only_its_own_process_waits() {
        let mut ordering = Ordering::new();
        let exec = ticket_of(ordering.submit(Class::Exec("a".into(), "x".into()), 1));
        assert_eq!(ordering.submit(Class::Process("a".into(), "x".into()), 2), Submitted::Held);
        assert_eq!(ordering.submit(Class::Process("a".into(), "y".into()), 3), Submitted::Run(3));
        assert!(matches!(
            ordering.submit(Class::Exec("a".into(), "y".into()), 4),
            Submitted::RunTracked(_, 4)
        ));
        assert_eq!(ordering.submit(Class::Remove("a".into()), 5), Submitted::Held);
        assert_eq!(ordering.finish(exec), Released::Untracked(vec![2]));
    }

    #[test]
    fn test_submit_when_removal_is_pending_then_other_container_exec_runs() {
        let mut ordering = Ordering::new();
        let removal = ticket_of(ordering.submit(Class::Remove("a".into()), 1));
        assert!(matches!(ordering.submit(Class::Exec("b".into(), "x".into()), 2), Submitted::RunTracked(..)));
        assert_eq!(ordering.submit(Class::Exec("a".into(), "x".into()), 3), Submitted::Held);
        assert_eq!(ordering.submit(create("c"), 4), Submitted::Held);
        let Released::Tracked(next) = ordering.finish(removal) else { panic!("tracked") };
        assert_eq!(next.iter().map(|(_, request)| *request).collect::<Vec<_>>(), [3, 4]);
    }
}
