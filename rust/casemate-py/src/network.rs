//! Network interfaces of the host.

use std::os::fd::{BorrowedFd, IntoRawFd as _, RawFd};

use casemate_netlink::TapOptions;
use pyo3::prelude::*;

use crate::error::Error;

/// A tap device as its descriptor and name.
#[pyfunction]
#[pyo3(signature = (name, *, borrow_netns_fd=None, owner=None))]
pub fn create_tap(
    py: Python<'_>,
    name: &str,
    borrow_netns_fd: Option<RawFd>,
    owner: Option<u32>,
) -> Result<(RawFd, String), Error> {
    if borrow_netns_fd.is_some_and(|fd| fd < 0) {
        return Err(Error::invalid("a descriptor of a network namespace is expected", "borrow_netns_fd"));
    }
    // SAFETY: the caller keeps the descriptor open over the call; it is not -1.
    let netns = borrow_netns_fd.map(|fd| unsafe { BorrowedFd::borrow_raw(fd) });
    let tap = py.detach(|| casemate_netlink::create_tap(name, &TapOptions::new(netns, owner)))?;
    Ok((tap.fd.into_raw_fd(), tap.name))
}
