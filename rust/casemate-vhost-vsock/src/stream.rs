//! One connection as the virtio-vsock protocol sees it: phase, credit in both directions, half close. No I/O.
//!
//! Whoever holds a [`Stream`] feeds it the guest's headers, obeys the [`Verdict`], says what the host socket took
//! and gave, and sends what [`Stream::next_control`] asks for.

use crate::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// What to do with a packet of a known connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing beyond what the stream noted itself.
    Noted,
    /// The guest accepted our request.
    Connected,
    /// Give this many bytes behind the header to the host.
    Deliver(usize),
    /// The guest ended one or both directions: see [`Stream::guest_sends`], [`Stream::guest_receives`].
    GuestShutdown,
    /// The guest has forgotten the connection (or refused it).
    GuestReset,
    /// The guest broke the protocol: reset the connection.
    Violation,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Our request is due or has been sent.
    Requested,
    /// Data may flow.
    Open,
    /// We said that both directions are over and wait for the guest's RST.
    Closing,
}

/// Protocol state of one connection.
#[derive(Debug)]
pub struct Stream {
    phase: Phase,
    window: u32,
    received: u32,
    forwarded: u32,
    told_forwarded: u32,
    peer_window: u32,
    peer_forwarded: u32,
    sent: u32,
    guest_shutdown: u32,
    host_shutdown: u32,
    told_shutdown: u32,
    open_due: Option<Op>,
    credit_update_due: bool,
    credit_request_due: bool,
    credit_requested: bool,
}

impl Stream {
    /// A connection that the host asks for; its REQUEST is due.
    #[must_use]
    pub fn requested(window: u32) -> Self {
        Self {
            phase: Phase::Requested,
            window,
            received: 0,
            forwarded: 0,
            told_forwarded: 0,
            peer_window: 0,
            peer_forwarded: 0,
            sent: 0,
            guest_shutdown: 0,
            host_shutdown: 0,
            told_shutdown: 0,
            open_due: Some(Op::Request),
            credit_update_due: false,
            credit_request_due: false,
            credit_requested: false,
        }
    }

    /// A connection that the guest asked for with `request` and the host has taken; its RESPONSE is due.
    #[must_use]
    pub fn accepted(window: u32, request: &Header) -> Self {
        let mut stream = Self::requested(window);
        stream.phase = Phase::Open;
        stream.open_due = Some(Op::Response);
        stream.note_credit(request);
        stream
    }

    fn note_credit(&mut self, header: &Header) {
        self.peer_window = header.buf_alloc;
        self.peer_forwarded = header.fwd_cnt;
        if self.credit() > 0 {
            self.credit_requested = false;
        }
    }

    /// Take in the header of a packet for this connection.
    pub fn on_packet(&mut self, header: &Header) -> Verdict {
        self.note_credit(header);
        match (header.op, self.phase) {
            (Op::Reset, _) => Verdict::GuestReset,
            (Op::Response, Phase::Requested) if self.open_due.is_none() => {
                self.phase = Phase::Open;
                Verdict::Connected
            }
            (Op::Data | Op::Shutdown | Op::CreditUpdate | Op::CreditRequest, Phase::Requested) => {
                Verdict::Violation
            }
            (Op::Data, _) => self.on_data(header.data_bytes),
            (Op::Shutdown, _) => {
                self.guest_shutdown |= header.flags & SHUTDOWN_BOTH;
                Verdict::GuestShutdown
            }
            (Op::CreditUpdate, _) => Verdict::Noted,
            (Op::CreditRequest, _) => {
                self.credit_update_due = true;
                Verdict::Noted
            }
            (Op::Request | Op::Response | Op::Unknown(_), _) => Verdict::Violation,
        }
    }

    fn on_data(&mut self, data_bytes: u32) -> Verdict {
        let free = self.window - self.backlog_bytes();
        if data_bytes > free || !self.guest_sends() {
            return Verdict::Violation;
        }
        self.received = self.received.wrapping_add(data_bytes);
        if self.host_shutdown & SHUTDOWN_RECEIVE != 0 {
            // What was under way when the host stopped receiving is taken and forgotten, as TCP would.
            self.forward(data_bytes as usize);
            return Verdict::Noted;
        }
        Verdict::Deliver(data_bytes as usize)
    }

    /// Bytes accepted from the guest that the host has not taken.
    #[must_use]
    pub fn backlog_bytes(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// The host took `bytes` of what was to be delivered.
    pub fn forward(&mut self, bytes: usize) {
        debug_assert!(bytes <= self.backlog_bytes() as usize);
        self.forwarded = self.forwarded.wrapping_add(bytes as u32);
        // Half a window: rare enough to cost little, early enough that a sender in full flow never stops.
        if self.forwarded.wrapping_sub(self.told_forwarded) >= self.window / 2 {
            self.credit_update_due = true;
        }
    }

    fn credit(&self) -> u32 {
        self.peer_window.saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    /// Bytes of data that may be sent to the guest now.
    #[must_use]
    pub fn sendable_bytes(&self) -> usize {
        let may = self.phase == Phase::Open && self.host_sends() && self.guest_receives();
        if may && self.open_due.is_none() { self.credit() as usize } else { 0 }
    }

    /// Whether only the guest's window keeps data back, and it was not asked yet.
    #[must_use]
    pub fn is_starving(&self) -> bool {
        let may = self.phase == Phase::Open && self.host_sends() && self.guest_receives();
        may && self.open_due.is_none() && self.credit() == 0 && !self.credit_requested
    }

    /// The window has been full for a while: ask for an update, once until there is room again.
    ///
    /// Linux tells by itself as its reader goes on, so asking at once would only cost packets.
    pub fn on_stall(&mut self) {
        if self.is_starving() {
            self.credit_requested = true;
            self.credit_request_due = true;
        }
    }

    /// `bytes` of data were sent to the guest.
    pub fn send(&mut self, bytes: usize) {
        self.sent = self.sent.wrapping_add(bytes as u32);
    }

    /// The host will send no more.
    pub fn on_host_end(&mut self) {
        self.host_shutdown |= SHUTDOWN_SEND;
    }

    /// The host will receive no more; what it has not taken is given up.
    pub fn on_host_deaf(&mut self) {
        self.host_shutdown |= SHUTDOWN_RECEIVE;
        self.forward(self.backlog_bytes() as usize);
    }

    /// Whether the guest may still send data.
    #[must_use]
    pub fn guest_sends(&self) -> bool {
        self.guest_shutdown & SHUTDOWN_SEND == 0
    }

    /// Whether the guest still takes data.
    #[must_use]
    pub fn guest_receives(&self) -> bool {
        self.guest_shutdown & SHUTDOWN_RECEIVE == 0
    }

    /// Whether the host may still send data.
    #[must_use]
    pub fn host_sends(&self) -> bool {
        self.host_shutdown & SHUTDOWN_SEND == 0
    }

    /// Whether our REQUEST has gone out and is not answered.
    #[must_use]
    pub fn awaits_response(&self) -> bool {
        self.phase == Phase::Requested && self.open_due.is_none()
    }

    /// Whether the connection was never accepted by the guest.
    #[must_use]
    pub fn is_requested(&self) -> bool {
        self.phase == Phase::Requested
    }

    /// Whether both directions are over for us and only the guest's RST is missing.
    #[must_use]
    pub fn is_closing(&self) -> bool {
        self.phase == Phase::Closing
    }

    /// Whether [`Stream::next_control`] would give something.
    #[must_use]
    pub fn has_control(&self) -> bool {
        self.open_due.is_some()
            || self.phase == Phase::Open
                && (self.credit_update_due || self.credit_request_due || self.shutdown_due())
    }

    fn shutdown_due(&self) -> bool {
        self.host_shutdown != self.told_shutdown
    }

    /// The next packet without data that has to be sent: operation and flags.
    pub fn next_control(&mut self) -> Option<(Op, u32)> {
        if let Some(op) = self.open_due.take() {
            return Some((op, 0));
        }
        if self.phase != Phase::Open {
            return None;
        }
        if self.shutdown_due() {
            self.told_shutdown = self.host_shutdown;
            if self.told_shutdown == SHUTDOWN_BOTH {
                self.phase = Phase::Closing;
            }
            return Some((Op::Shutdown, self.told_shutdown));
        }
        if std::mem::take(&mut self.credit_request_due) {
            return Some((Op::CreditRequest, 0));
        }
        std::mem::take(&mut self.credit_update_due).then_some((Op::CreditUpdate, 0))
    }

    /// Our window and count, for a header.
    #[must_use]
    pub fn credit_words(&self) -> (u32, u32) {
        (self.window, self.forwarded)
    }

    /// A packet with [`Stream::credit_words`] was sent. Said of one that was not, the guest would wait for ever.
    pub fn on_credit_told(&mut self) {
        self.told_forwarded = self.forwarded;
        self.credit_update_due = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{HOST_CID, TYPE_STREAM};
    use proptest::prelude::*;

    const WINDOW: u32 = 1024;

    fn packet(op: Op, data_bytes: u32) -> Header {
        Header {
            src_cid: 3,
            dst_cid: HOST_CID,
            src_port: 1,
            dst_port: 2,
            data_bytes,
            socket_type: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: 4096,
            fwd_cnt: 0,
        }
    }

    fn opened() -> Stream {
        let mut stream = Stream::accepted(WINDOW, &packet(Op::Request, 0));
        assert_eq!(stream.next_control(), Some((Op::Response, 0)));
        stream
    }

    #[test]
    fn test_request_when_answered_then_connected_and_data_may_flow() {
        let mut stream = Stream::requested(WINDOW);
        assert_eq!(stream.sendable_bytes(), 0);
        assert_eq!(stream.next_control(), Some((Op::Request, 0)));
        assert_eq!(stream.on_packet(&packet(Op::Response, 0)), Verdict::Connected);
        assert_eq!(stream.sendable_bytes(), 4096);
    }

    #[test]
    fn test_response_when_request_was_never_sent_then_violation() {
        assert_eq!(Stream::requested(WINDOW).on_packet(&packet(Op::Response, 0)), Verdict::Violation);
    }

    #[test]
    fn test_data_when_over_the_window_then_violation() {
        let mut stream = opened();
        assert_eq!(stream.on_packet(&packet(Op::Data, WINDOW)), Verdict::Deliver(WINDOW as usize));
        assert_eq!(stream.on_packet(&packet(Op::Data, 1)), Verdict::Violation);
        stream.forward(10);
        assert_eq!(stream.on_packet(&packet(Op::Data, 11)), Verdict::Violation);
        assert_eq!(stream.on_packet(&packet(Op::Data, 10)), Verdict::Deliver(10));
    }

    #[test]
    fn test_credit_when_half_a_window_is_taken_then_update_is_due_once() {
        let mut stream = opened();
        stream.on_credit_told();
        stream.on_packet(&packet(Op::Data, WINDOW));
        stream.forward(WINDOW as usize / 2 - 1);
        assert!(!stream.has_control());
        stream.forward(1);
        assert_eq!(stream.next_control(), Some((Op::CreditUpdate, 0)));
        assert_eq!(stream.credit_words(), (WINDOW, WINDOW / 2));
        stream.on_credit_told();
        assert_eq!(stream.next_control(), None);
    }

    #[test]
    fn test_send_when_the_guest_window_is_full_then_credit_is_asked_for_once() {
        let mut stream = opened();
        stream.send(4096);
        assert_eq!(stream.sendable_bytes(), 0);
        stream.on_stall();
        stream.on_stall();
        assert_eq!(stream.next_control(), Some((Op::CreditRequest, 0)));
        assert_eq!(stream.next_control(), None);
        stream.on_packet(&Header { fwd_cnt: 100, ..packet(Op::CreditUpdate, 0) });
        assert_eq!(stream.sendable_bytes(), 100);
    }

    #[test]
    fn test_credit_when_the_guest_claims_more_than_was_sent_then_nothing_is_sendable() {
        let mut stream = opened();
        stream.on_packet(&Header { fwd_cnt: 5, ..packet(Op::CreditUpdate, 0) });
        assert_eq!(stream.sendable_bytes(), 0);
    }

    #[test]
    fn test_half_close_when_each_side_ends_then_the_other_direction_goes_on() {
        let mut stream = opened();
        let end = Header { flags: SHUTDOWN_SEND, ..packet(Op::Shutdown, 0) };
        assert_eq!(stream.on_packet(&end), Verdict::GuestShutdown);
        assert!(!stream.guest_sends() && stream.guest_receives());
        assert_eq!(stream.sendable_bytes(), 4096);
        assert_eq!(stream.on_packet(&packet(Op::Data, 1)), Verdict::Violation);
        stream.on_host_end();
        assert_eq!(stream.next_control(), Some((Op::Shutdown, SHUTDOWN_SEND)));
        stream.on_host_deaf();
        assert_eq!(stream.next_control(), Some((Op::Shutdown, SHUTDOWN_BOTH)));
        assert!(stream.is_closing());
    }

    #[test]
    fn test_data_when_the_host_is_deaf_then_taken_and_forgotten() {
        let mut stream = opened();
        stream.on_packet(&packet(Op::Data, 100));
        stream.on_host_deaf();
        assert_eq!(stream.backlog_bytes(), 0);
        assert_eq!(stream.on_packet(&packet(Op::Data, WINDOW)), Verdict::Noted);
        assert_eq!(stream.backlog_bytes(), 0);
    }

    fn any_packet() -> impl Strategy<Value = Header> {
        (0u16..9, 0u32..2 * WINDOW, 0u32..8, any::<u32>(), any::<u32>()).prop_map(
            |(op, data_bytes, flags, buf_alloc, fwd_cnt)| Header {
                flags,
                buf_alloc,
                fwd_cnt,
                ..packet(Op::from_wire(op), data_bytes)
            },
        )
    }

    proptest! {
        #[test]
        fn test_stream_when_any_packets_come_then_backlog_stays_in_the_window(
            packets in prop::collection::vec((any_packet(), 0u32..WINDOW, any::<u8>()), 0..200),
        ) {
            let mut stream = opened();
            for (packet, take, choice) in packets {
                let verdict = stream.on_packet(&packet);
                prop_assert!(stream.backlog_bytes() <= WINDOW);
                if matches!(verdict, Verdict::Violation | Verdict::GuestReset) {
                    break;
                }
                stream.forward(take.min(stream.backlog_bytes()) as usize);
                let sendable = stream.sendable_bytes();
                prop_assert!(sendable <= packet.buf_alloc as usize);
                stream.send(sendable.min(take as usize));
                match choice {
                    0 => stream.on_host_end(),
                    1 => stream.on_host_deaf(),
                    _ => stream.on_stall(),
                }
                while stream.next_control().is_some() {
                    stream.on_credit_told();
                }
            }
        }
    }
}
