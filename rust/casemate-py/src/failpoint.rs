//! `FailpointScript` and `set_failpoints`: the grammar is read in Python, scripts run here.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use casemate_failpoint::{Action, POINTS, Script, Term};
use pyo3::prelude::*;

use crate::error::Error;

/// What one native point does, hit by hit.
#[pyclass(frozen, module = "casemate._core")]
pub struct FailpointScript(Arc<Script>);

fn term((hits, verb, argument): (Option<u32>, String, String)) -> Result<Term, Error> {
    let action = match verb.as_str() {
        "off" => Action::Off,
        "error" => Action::Error(argument),
        "cancel" => Action::Cancel,
        "kill" => Action::Kill,
        "delay" => {
            let time_ms = argument.parse().map_err(|_| {
                Error::invalid(format!("delay is {argument:?}, milliseconds are expected"), "terms")
            })?;
            Action::Delay(Duration::from_millis(time_ms))
        }
        _ => return Err(Error::invalid(format!("{verb:?} is no action of a failpoint"), "terms")),
    };
    Ok((hits, action))
}

#[pymethods]
impl FailpointScript {
    /// Terms: how many hits (None: all that follow), action, argument.
    #[new]
    fn new(terms: Vec<(Option<u32>, String, String)>) -> Result<Self, Error> {
        let terms: Vec<Term> = terms.into_iter().map(term).collect::<Result<_, _>>()?;
        Ok(Self(Arc::new(Script::new(terms))))
    }

    /// How often the point was passed while this was set.
    #[getter]
    fn hits(&self) -> u64 {
        self.0.hits()
    }
}

/// Set these scripts, by point, in place of all that are set.
#[pyfunction]
pub fn set_failpoints(scripts: HashMap<String, Py<FailpointScript>>) -> Result<(), Error> {
    if let Some(name) = scripts.keys().find(|name| !POINTS.contains(&name.as_str())) {
        return Err(Error::invalid(format!("there is no native failpoint {name:?}"), "scripts"));
    }
    casemate_failpoint::set(
        scripts.into_iter().map(|(name, script)| (name, Arc::clone(&script.get().0))).collect(),
    );
    Ok(())
}
