//! The device as the VMM sees it: features, guest memory, rings. Handles vhost-user requests.
//!
//! Source: QEMU's vhost-user protocol text; VIRTIO 1.2, section 5.10 «Socket Device».

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::sync::Arc;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Backend, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use vm_memory::{GuestAddress, GuestMemoryRegion as _, GuestRegionMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::chain::Memory;
use crate::ring::Ring;

/// Index of the ring with buffers for packets to the guest.
pub const RX: usize = 0;
/// Index of the ring with packets from the guest.
pub const TX: usize = 1;
/// The third ring carries transport events; the VMM keeps it or it stays unused.
const RINGS: usize = 3;

/// Most memory regions of one guest; each costs a mapping.
const MAX_REGIONS: usize = 256;

const VIRTIO_RING_F_INDIRECT_DESC: u64 = 1 << 28;
const VIRTIO_RING_F_EVENT_IDX: u64 = 1 << 29;
const VIRTIO_F_VERSION_1: u64 = 1 << 32;

/// Where a region of guest memory is in the VMM's own address space, in which it names rings.
#[derive(Clone, Copy, Debug)]
struct Mapping {
    vmm_base: u64,
    guest_base: u64,
    bytes: u64,
}

/// State of the device that the VMM controls.
#[derive(Debug)]
pub struct Device {
    guest_cid: u64,
    epoll: Arc<Epoll>,
    first_kick_token: u64,
    owned: bool,
    acked_features: u64,
    mappings: Vec<Mapping>,
    memory: Arc<Memory>,
    rings: [Ring; RINGS],
    guest_replaced: bool,
    rings_changed: bool,
}

impl Device {
    /// A device without memory. Kicks of ring `n` are reported by `epoll` under `first_kick_token + n`.
    pub fn new(
        guest_cid: u32,
        epoll: Arc<Epoll>,
        first_kick_token: u64,
    ) -> std::result::Result<Self, virtio_queue::Error> {
        Ok(Self {
            guest_cid: u64::from(guest_cid),
            epoll,
            first_kick_token,
            owned: false,
            acked_features: 0,
            mappings: Vec::new(),
            memory: Arc::new(Memory::new()),
            rings: [Ring::new()?, Ring::new()?, Ring::new()?],
            guest_replaced: false,
            rings_changed: false,
        })
    }

    /// Guest memory as it is now.
    pub fn memory(&self) -> Arc<Memory> {
        Arc::clone(&self.memory)
    }

    /// The two rings with packets: to the guest, from the guest.
    pub fn packet_rings(&mut self) -> (&mut Ring, &mut Ring) {
        let [rx, tx, _] = &mut self.rings;
        (rx, tx)
    }

    /// Whether packets can flow.
    pub fn is_running(&self) -> bool {
        self.rings[RX].is_running() && self.rings[TX].is_running()
    }

    /// Whether a new driver took over since the last call, so that its guest knows no connection.
    pub fn take_guest_replaced(&mut self) -> bool {
        std::mem::take(&mut self.guest_replaced)
    }

    /// Whether a ring started or stopped since the last call.
    pub fn take_rings_changed(&mut self) -> bool {
        std::mem::take(&mut self.rings_changed)
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring> {
        self.rings.get_mut(index as usize).ok_or(Error::InvalidParam)
    }

    /// Watch the kick descriptor exactly while the ring runs.
    fn watch_kick(&mut self, index: u32) -> Result<()> {
        self.rings_changed = true;
        let token = self.first_kick_token + u64::from(index);
        let ring = self.rings.get(index as usize).ok_or(Error::InvalidParam)?;
        let Some(kick) = ring.kick() else { return Ok(()) };
        if !ring.is_running() {
            return self.ignore_kick(kick);
        }
        // Edge-triggered and never read: each write of the guest is one event. Adding reports writes of before.
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token);
        match self.epoll.ctl(ControlOperation::Add, kick.as_raw_fd(), event) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(Error::ReqHandlerError(error)),
            _ => Ok(()),
        }
    }

    fn ignore_kick(&self, kick: &File) -> Result<()> {
        match self.epoll.ctl(ControlOperation::Delete, kick.as_raw_fd(), EpollEvent::default()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::ReqHandlerError(error)),
            _ => Ok(()),
        }
    }

    fn start_ring(&mut self, index: u32) -> Result<()> {
        let memory = self.memory();
        if !self.ring(index)?.start(&memory) {
            self.guest_replaced = true;
        }
        self.watch_kick(index)
    }

    fn stop_ring(&mut self, index: u32) -> Result<u16> {
        let next_available = self.ring(index)?.stop();
        self.watch_kick(index)?;
        let ring = self.ring(index)?;
        ring.set_kick(None);
        ring.set_call(None);
        Ok(next_available)
    }

    fn guest_address(&self, vmm_address: u64) -> Option<u64> {
        self.mappings.iter().find_map(|mapping| {
            let offset = vmm_address.checked_sub(mapping.vmm_base)?;
            (offset < mapping.bytes).then(|| mapping.guest_base.checked_add(offset))?
        })
    }

    fn set_regions(&mut self, regions: Vec<Arc<GuestRegionMmap<()>>>) -> Result<()> {
        let memory = Memory::from_arc_regions(regions)
            .map_err(|error| Error::ReqHandlerError(io::Error::other(error)))?;
        self.memory = Arc::new(memory);
        Ok(())
    }
}

/// Map one region; a forked child gets no copy of it, and a core dump does not hold it.
fn map_region(region: &VhostUserMemoryRegion, file: File) -> Result<(Mapping, Arc<GuestRegionMmap<()>>)> {
    let invalid = || Error::ReqHandlerError(io::ErrorKind::InvalidInput.into());
    let mapped = GuestRegionMmap::new(region.mmap_region(file)?, GuestAddress(region.guest_phys_addr))
        .ok_or_else(invalid)?;
    for advice in [libc::MADV_DONTFORK, libc::MADV_DONTDUMP] {
        // SAFETY: the range is one mapping that we own; the advice changes no byte of it.
        if unsafe { libc::madvise(mapped.as_ptr().cast(), mapped.size(), advice) } != 0 {
            log::debug!("guest memory without advice {advice}: {}", io::Error::last_os_error());
        }
    }
    let mapping =
        Mapping { vmm_base: region.user_addr, guest_base: region.guest_phys_addr, bytes: region.memory_size };
    Ok((mapping, Arc::new(mapped)))
}

impl VhostUserBackendReqHandlerMut for Device {
    fn set_owner(&mut self) -> Result<()> {
        if self.owned {
            return Err(Error::InvalidOperation("already owned"));
        }
        self.owned = true;
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.owned = false;
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        for index in 0..RINGS as u32 {
            self.stop_ring(index)?;
            self.ring(index)?.set_enabled(false);
        }
        self.acked_features = 0;
        self.guest_replaced = true;
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(VIRTIO_F_VERSION_1
            | VIRTIO_RING_F_INDIRECT_DESC
            | VIRTIO_RING_F_EVENT_IDX
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.get_features()? != 0 {
            return Err(Error::InvalidParam);
        }
        self.acked_features = features;
        for ring in &mut self.rings {
            ring.set_event_index(features & VIRTIO_RING_F_EVENT_IDX != 0);
        }
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            // Without protocol features there is no enable request: rings are enabled from the start.
            for index in 0..RINGS as u32 {
                self.ring(index)?.set_enabled(true);
                self.watch_kick(index)?;
            }
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        if regions.len() > MAX_REGIONS {
            return Err(Error::InvalidParam);
        }
        let mapped = regions
            .iter()
            .zip(files)
            .map(|(region, file)| map_region(region, file))
            .collect::<Result<Vec<_>>>()?;
        let (mappings, mut regions): (Vec<_>, Vec<_>) = mapped.into_iter().unzip();
        regions.sort_by_key(|region| region.start_addr());
        self.set_regions(regions)?;
        self.mappings = mappings;
        Ok(None)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        if self.mappings.len() >= MAX_REGIONS {
            return Err(Error::InvalidParam);
        }
        let (mapping, mapped) = map_region(region, file)?;
        let memory = self
            .memory
            .insert_region(mapped)
            .map_err(|error| Error::ReqHandlerError(io::Error::other(error)))?;
        self.memory = Arc::new(memory);
        self.mappings.push(mapping);
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let (memory, _) = self
            .memory
            .remove_region(GuestAddress(region.guest_phys_addr), region.memory_size)
            .map_err(|error| Error::ReqHandlerError(io::Error::other(error)))?;
        self.memory = Arc::new(memory);
        self.mappings.retain(|mapping| mapping.guest_base != region.guest_phys_addr);
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.ring(index)?.set_size(num);
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let memory = self.memory();
        let addresses = [descriptor, available, used].map(|address| self.guest_address(address));
        // The guest chose them: addresses that can't be are its own loss, not an end of the backend.
        let addresses = match addresses {
            [Some(descriptor), Some(available), Some(used)] => Some([descriptor, available, used]),
            _ => None,
        };
        self.ring(index)?.set_addresses(&memory, addresses);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.ring(index)?.set_next_available(base as u16);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let next_available = self.stop_ring(index)?;
        Ok(VhostUserVringState::new(index, u32::from(next_available)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let index = u32::from(index);
        let has_kick = fd.is_some();
        if let Some(former) = self.ring(index)?.set_kick(fd) {
            self.ignore_kick(&former)?;
        }
        // Polling a ring without a kick descriptor is not offered.
        if has_kick { self.start_ring(index) } else { Err(Error::InvalidParam) }
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.ring(u32::from(index))?.set_call(fd);
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, _fd: Option<File>) -> Result<()> {
        self.ring(u32::from(index)).map(|_| ())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        if features & !self.get_protocol_features()?.bits() == 0 { Ok(()) } else { Err(Error::InvalidParam) }
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(RINGS as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.ring(index)?.set_enabled(enable);
        self.watch_kick(index)
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let config = self.guest_cid.to_le_bytes();
        let start = offset as usize;
        let end = start.saturating_add(size as usize);
        config.get(start..end).map(<[u8]>::to_vec).ok_or(Error::InvalidParam)
    }

    fn set_config(&mut self, _offset: u32, _buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        Err(Error::InvalidOperation("the configuration is read-only"))
    }

    fn set_backend_req_fd(&mut self, _backend: Backend) {}

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("not a GPU"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("no shared objects"))
    }

    fn get_inflight_fd(&mut self, _inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidOperation("no in-flight tracking"))
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("no in-flight tracking"))
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("no migration"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("no migration"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("no shared memory regions"))
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("no dirty log"))
    }
}
