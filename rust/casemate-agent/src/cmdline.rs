//! The kernel command line, as far as it is for the agent.

use std::time::Duration;

use log::LevelFilter;

use crate::error::{AgentError, Result};

/// Settings of the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Lines below it are dropped.
    pub log_level: LevelFilter,
    /// Port on the host (context id 2) to connect to when ready.
    pub host_port: Option<u32>,
    /// How long a device that is named in a request may take to appear.
    pub hotplug_timeout: Duration,
    /// Size of the pipes that carry a container's output; None: the kernel's default.
    pub pipe_size_bytes: Option<u32>,
    /// Whether the kernel parameters ask for cgroup version 1.
    pub wants_cgroup_v1: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            log_level: LevelFilter::Info,
            host_port: None,
            hotplug_timeout: Duration::from_secs(3),
            // A large pipe lets a container go on while its output is under way.
            pipe_size_bytes: Some(1 << 20),
            wants_cgroup_v1: false,
        }
    }
}

impl Settings {
    /// Read the parameters that are for the agent; all others are ignored.
    ///
    /// # Errors
    /// Names the parameter whose value can't be understood.
    pub fn parse(cmdline: &str) -> Result<Self> {
        let mut settings = Self::default();
        for word in cmdline.split_ascii_whitespace() {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            match name {
                "agent.log" => settings.log_level = parse_level(value)?,
                "agent.hotplug_timeout" => {
                    let seconds: u64 = number("agent.hotplug_timeout", value)?;
                    if seconds > 0 {
                        settings.hotplug_timeout = Duration::from_secs(seconds);
                    }
                }
                "agent.container_pipe_size" => {
                    let bytes: u32 = number("agent.container_pipe_size", value)?;
                    settings.pipe_size_bytes = (bytes > 0).then_some(bytes);
                }
                "casemate.host_port" => settings.host_port = Some(number("casemate.host_port", value)?),
                "systemd.unified_cgroup_hierarchy" => settings.wants_cgroup_v1 = !is_true(value),
                "cgroup_no_v1" if value == "all" => settings.wants_cgroup_v1 = false,
                _ => {}
            }
        }
        Ok(settings)
    }
}

/// `true`, or an integer other than zero.
fn is_true(value: &str) -> bool {
    value == "true" || value.parse::<i64>().is_ok_and(|number| number != 0)
}

fn number<T: std::str::FromStr>(name: &'static str, value: &str) -> Result<T> {
    value.parse().map_err(|_| AgentError::invalid(name, format!("`{value}` is not a number in range")))
}

fn parse_level(value: &str) -> Result<LevelFilter> {
    Ok(match value {
        "fatal" | "panic" | "critical" | "error" => LevelFilter::Error,
        "warn" | "warning" => LevelFilter::Warn,
        "info" => LevelFilter::Info,
        "debug" => LevelFilter::Debug,
        "trace" => LevelFilter::Trace,
        _ => return Err(AgentError::invalid("agent.log", format!("unknown level `{value}`"))),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_parse_when_nothing_is_for_the_agent_then_defaults() {
        let settings = Settings::parse("console=ttyS0 quiet panic=-1 root=/dev/vda\n").expect("parses");
        assert_eq!(settings, Settings::default());
    }

    #[test]
    fn test_parse_when_all_are_given_then_taken() {
        let text =
            "agent.log=debug casemate.host_port=5000 agent.hotplug_timeout=7 agent.container_pipe_size=65536";
        let settings = Settings::parse(text).expect("parses");
        assert_eq!(settings.log_level, LevelFilter::Debug);
        assert_eq!(settings.host_port, Some(5000));
        assert_eq!(settings.hotplug_timeout, Duration::from_secs(7));
        assert_eq!(settings.pipe_size_bytes, Some(65536));
    }

    #[test]
    fn test_parse_when_zero_then_timeout_keeps_and_pipe_takes_kernel_default() {
        let settings =
            Settings::parse("agent.hotplug_timeout=0 agent.container_pipe_size=0").expect("parses");
        assert_eq!(settings.hotplug_timeout, Duration::from_secs(3));
        assert_eq!(settings.pipe_size_bytes, None);
    }

    #[test]
    fn test_parse_when_value_is_malformed_then_error_names_parameter() {
        for word in [
            "agent.log=loud",
            "agent.hotplug_timeout=x",
            "agent.container_pipe_size=-1",
            "casemate.host_port=",
        ] {
            let error = Settings::parse(word).expect_err(word).to_string();
            assert!(error.starts_with(word.split('=').next().expect("a name")), "{error}");
        }
    }

    #[test]
    fn test_parse_when_cgroup_version_is_asked_then_taken() {
        let wants_v1 = |text: &str| Settings::parse(text).expect("parses").wants_cgroup_v1;
        assert!(wants_v1("systemd.unified_cgroup_hierarchy=0"));
        assert!(wants_v1("systemd.unified_cgroup_hierarchy=false"));
        assert!(!wants_v1("systemd.unified_cgroup_hierarchy=true"));
        assert!(!wants_v1("systemd.unified_cgroup_hierarchy=0 cgroup_no_v1=all"));
        assert!(!wants_v1(""));
    }
}
