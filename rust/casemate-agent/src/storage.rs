//! Storages: file systems that a request wants mounted in the guest before its containers use them.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use casemate_proto::grpc::Storage;
use nix::unistd::{Gid, chown};

use crate::device::block::BlockAddress;
use crate::device::uevent::DeviceEvents;
use crate::error::{AgentError, Context, Result};
use crate::init::modules::ModuleLoader;
use crate::mount::{MountOptions, mount_with, unmount};

/// Drivers, as the agent reports them.
pub const DRIVERS: [&str; 6] = ["bind", "blk", "ephemeral", "local", "mmioblk", "overlayfs"];

const OVERLAY_RW: &str = "io.katacontainers.fs-opt.overlay-rw";
const CREATE_DIRECTORY: &str = "io.katacontainers.volume.overlayfs.create_directory=";

/// What is mounted, counted by mount point.
#[derive(Debug, Default)]
pub struct Storages {
    uses: Mutex<HashMap<String, Use>>,
}

#[derive(Debug)]
struct Use {
    count: u32,
    is_shared: bool,
}

/// What a storage may need besides itself.
#[derive(Debug)]
pub struct StorageContext<'a> {
    /// Container that it is for; empty for the sandbox.
    pub container_id: &'a str,
    /// Waits for devices.
    pub events: &'a DeviceEvents,
    /// Loads what a file system needs.
    pub modules: &'a ModuleLoader,
    /// How long a device may take to appear.
    pub hotplug_timeout: Duration,
}

impl Storages {
    /// Mount all, in order; the mount points in use. On failure those mounted by this call are released again.
    pub fn add_all(&self, storages: &[Storage], context: &StorageContext<'_>) -> Result<Vec<String>> {
        let mut added: Vec<String> = Vec::new();
        for storage in storages {
            if let Err(error) = self.add(storage, context) {
                self.release_all(&added);
                return Err(error);
            }
            added.push(storage.mount_point.clone());
        }
        Ok(added)
    }

    fn add(&self, storage: &Storage, context: &StorageContext<'_>) -> Result<()> {
        let target = storage.mount_point.as_str();
        if !target.starts_with('/') || target.split('/').any(|part| part == "..") {
            return Err(AgentError::invalid("mount_point", format!("`{target}` is not an absolute path")));
        }
        // Held while mounting: a second user of the same mount point must find it mounted.
        let mut uses = self.uses.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = uses.get_mut(target) {
            known.count += 1;
            return Ok(());
        }
        mount_storage(storage, context)?;
        uses.insert(target.to_owned(), Use { count: 1, is_shared: storage.shared });
        Ok(())
    }

    /// Give up one use of each, last first; what nobody uses is unmounted, unless it is shared by the sandbox.
    pub fn release_all(&self, mount_points: &[String]) {
        for target in mount_points.iter().rev() {
            let mut uses = self.uses.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(known) = uses.get_mut(target) else { continue };
            known.count = known.count.saturating_sub(1);
            if known.count > 0 || known.is_shared {
                continue;
            }
            uses.remove(target);
            if let Err(error) = unmount(target) {
                log::warn!("{error}");
            } else if let Err(error) = fs::remove_dir(target) {
                log::debug!("{target} stays: {error}");
            }
        }
    }
}

fn mount_storage(storage: &Storage, context: &StorageContext<'_>) -> Result<()> {
    match storage.driver.as_str() {
        "blk" | "mmioblk" => {
            context.modules.load_on_demand(&storage.fstype)?;
            let node = BlockAddress::parse(&storage.source)?.wait(context.events, context.hotplug_timeout)?;
            mount_common(storage, &node, &storage.fstype, &storage.options)
        }
        "overlayfs" => mount_overlay(storage, context.container_id),
        "ephemeral" => mount_ephemeral(storage),
        "local" => make_local(storage),
        "bind" => {
            let mut options = storage.options.clone();
            if !options.iter().any(|option| option == "bind" || option == "rbind") {
                options.push("bind".to_owned());
            }
            mount_common(storage, &storage.source, "bind", &options)
        }
        other => {
            Err(AgentError::Unsupported { what: format!("Failed to find the storage handler {other}: it") })
        }
    }
}

fn make_directory(path: &str) -> Result<()> {
    fs::create_dir_all(path).context("mkdir", path)
}

fn mount_common(storage: &Storage, source: &str, fstype: &str, options: &[String]) -> Result<()> {
    let parsed = MountOptions::parse(options)?;
    let target = storage.mount_point.as_str();
    if parsed.is_bind() && !Path::new(source).is_dir() {
        if let Some(parent) = Path::new(target).parent() {
            make_directory(&parent.to_string_lossy())?;
        }
        fs::OpenOptions::new().append(true).create(true).open(target).context("create", target)?;
    } else {
        make_directory(target)?;
    }
    mount_with(source, target, fstype, &parsed)?;
    apply_group(storage)
}

/// Change the group of the volume's root. Deeper changes are a walk that nobody has asked for yet.
fn apply_group(storage: &Storage) -> Result<()> {
    match &storage.fs_group {
        None => Ok(()),
        Some(group) => set_group(&storage.mount_point, group.group_id, None),
    }
}

fn set_group(path: &str, gid: u32, mode: Option<u32>) -> Result<()> {
    const SET_GID: u32 = 0o2000;
    chown(path, None, Some(Gid::from_raw(gid))).context("chown", path)?;
    let current = fs::metadata(path).context("stat", path)?.permissions().mode();
    let mode = mode.unwrap_or(current) | SET_GID;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).context("chmod", path)
}

fn mount_overlay(storage: &Storage, container_id: &str) -> Result<()> {
    let mut options = storage.options.clone();
    if let Some(place) = options.iter().position(|option| option == OVERLAY_RW) {
        if container_id.is_empty() {
            return Err(AgentError::invalid("options", format!("{OVERLAY_RW} without a container")));
        }
        options.remove(place);
        let base = format!("/run/kata-containers/{container_id}");
        options.push(format!("upperdir={base}/upper"));
        options.push(format!("workdir={base}/work"));
    }
    let wanted = storage.driver_options.iter().filter_map(|option| option.strip_prefix(CREATE_DIRECTORY));
    let given = options
        .iter()
        .filter_map(|option| option.strip_prefix("upperdir=").or_else(|| option.strip_prefix("workdir=")));
    for directory in wanted.chain(given) {
        make_directory(directory)?;
    }
    mount_common(storage, "overlay", "overlay", &options)
}

/// Number after `key=` among the options.
fn option_number(options: &[String], key: &'static str, radix: u32) -> Result<Option<u32>> {
    let Some(text) = options.iter().find_map(|option| option.strip_prefix(key)?.strip_prefix('=')) else {
        return Ok(None);
    };
    u32::from_str_radix(text, radix)
        .map(Some)
        .map_err(|_| AgentError::invalid("options", format!("{key}={text} is not a number")))
}

fn mount_ephemeral(storage: &Storage) -> Result<()> {
    let gid = option_number(&storage.options, "fsgid", 10)?;
    let options: Vec<String> =
        storage.options.iter().filter(|option| !option.starts_with("fsgid=")).cloned().collect();
    let fstype = if storage.fstype.is_empty() { "tmpfs" } else { &storage.fstype };
    let source = if storage.source.is_empty() { fstype } else { &storage.source };
    mount_common(storage, source, fstype, &options)?;
    gid.map_or(Ok(()), |gid| set_group(&storage.mount_point, gid, None))
}

fn make_local(storage: &Storage) -> Result<()> {
    let path = storage.mount_point.as_str();
    let (gid, mode) =
        (option_number(&storage.options, "fsgid", 10)?, option_number(&storage.options, "mode", 8)?);
    make_directory(path)?;
    if let Some(gid) = gid {
        return set_group(path, gid, mode);
    }
    mode.map_or(Ok(()), |mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).context("chmod", path)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context<'a>(events: &'a DeviceEvents, modules: &'a ModuleLoader) -> StorageContext<'a> {
        StorageContext { container_id: "c1", events, modules, hotplug_timeout: Duration::from_millis(1) }
    }

    #[test]
    fn test_add_all_when_driver_is_unknown_then_text_names_it() {
        let events = DeviceEvents::default();
        let storage = Storage { driver: "9p".into(), mount_point: "/nope/x".into(), ..Default::default() };
        let error = Storages::default()
            .add_all(&[storage], &context(&events, &ModuleLoader::none()))
            .expect_err("unknown");
        assert!(error.to_string().contains("Failed to find the storage handler 9p"), "{error}");
    }

    #[test]
    fn test_add_all_when_local_then_made_counted_and_released() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("volume").display().to_string();
        let storage = Storage {
            driver: "local".into(),
            mount_point: path.clone(),
            options: vec!["mode=0751".into()],
            ..Default::default()
        };
        let events = DeviceEvents::default();
        let storages = Storages::default();
        let points = storages
            .add_all(&[storage.clone(), storage], &context(&events, &ModuleLoader::none()))
            .expect("made");
        assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o7777, 0o751);
        storages.release_all(&points[..1]);
        assert!(Path::new(&path).exists());
        storages.release_all(&points[1..]);
        assert!(!Path::new(&path).exists());
    }

    #[test]
    fn test_add_all_when_a_later_one_fails_then_earlier_are_released() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("volume").display().to_string();
        let good = Storage { driver: "local".into(), mount_point: path.clone(), ..Default::default() };
        let bad = Storage {
            driver: "blk".into(),
            source: "1f".into(),
            mount_point: "/x".into(),
            ..Default::default()
        };
        let events = DeviceEvents::default();
        let storages = Storages::default();
        assert!(storages.add_all(&[good, bad], &context(&events, &ModuleLoader::none())).is_err());
        assert!(!Path::new(&path).exists());
        assert!(storages.uses.lock().expect("no panic").is_empty());
    }

    #[test]
    fn test_add_all_when_mount_point_climbs_then_refused() {
        let storage = Storage { driver: "local".into(), mount_point: "/a/../b".into(), ..Default::default() };
        let events = DeviceEvents::default();
        assert!(Storages::default().add_all(&[storage], &context(&events, &ModuleLoader::none())).is_err());
    }
}
