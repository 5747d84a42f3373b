//! Mappings and pins of other processes, and taking devices away from them.

use core::time::Duration;
use std::borrow::Cow;
use std::sync::Arc;

use pgmap_drivers::block::BlockDevice;
use pgmap_drivers::pmem::{
    AccessError, Client, Hold, HoldKind, Holders, Patience, Pmem, Sharing, UnbindError,
};

use super::failure::Mapping;
use super::{Device, Keep, Service, afterwards};
use crate::control::Session;
use crate::control::protocol::{Answer, Code, Failure, Holder, RangeOf};

impl Service {
    pub(super) fn map_range(
        &self,
        range: &RangeOf,
        session: &mut Session,
    ) -> Result<Answer, Failure> {
        let device = self.device(&range.namespace)?;
        let bytes = bytes_of(range, &device.pmem);
        let guard = device
            .pmem
            .map(bytes, Sharing::Shared, client(session, "direct"))
            .map_err(|error| access_failure(&error))?;
        let none = || Failure::new(Code::Unsupported, "this device has no file to map");
        let file = guard.fd().ok_or_else(none)?;
        let file = file
            .try_clone_to_owned()
            .map_err(|error| Failure::new(Code::Failed, error))?;
        let (offset, length) = (guard.offset(), guard.len());
        let id = session.hold(Mapping::new(guard))?;
        session.attach(file);
        Ok(Answer::Mapped { id, offset, length })
    }

    pub(super) fn pin_range(
        &self,
        range: &RangeOf,
        label: String,
        session: &mut Session,
    ) -> Result<Answer, Failure> {
        let device = self.device(&range.namespace)?;
        let bytes = bytes_of(range, &device.pmem);
        let guard = device
            .pmem
            .pin(bytes, client(session, label))
            .map_err(|error| access_failure(&error))?;
        let id = session.hold(guard)?;
        Ok(Answer::Held { id })
    }

    /// Takes a device out of use: see [`take_all_away`](Self::take_all_away).
    pub(super) fn take_away(
        &self,
        key: (u32, u32),
        patience: Option<Duration>,
        keep: Keep,
        session: &Session,
    ) -> Result<(), Failure> {
        let found = self.regions.lock().devices.get(&key).cloned();
        match found {
            Some(device) => self.take_all_away(&[(key, device)], patience, keep, session),
            None => self.note_absence(&self.turn.lock(), key, keep),
        }
    }

    /// Takes all devices of a region out of use, and forgets volatile bytes: see [`take_all_away`](Self::take_all_away).
    pub(super) fn take_region_away(
        &self,
        region: u32,
        patience: Option<Duration>,
        session: &Session,
    ) -> Result<(), Failure> {
        let devices: Vec<_> = {
            let regions = self.regions.lock();
            let devices = regions.devices.iter().filter(|(key, _)| key.0 == region);
            devices
                .map(|(key, device)| (*key, device.clone()))
                .collect()
        };
        self.take_all_away(&devices, patience, Keep::Nothing, session)
    }

    /// Takes devices out of use, and ends the connections of their clients. If one is held at the deadline, or nobody waits for the
    /// answer any more, all are as they were: nothing is given up before nobody uses any of them.
    fn take_all_away(
        &self,
        devices: &[((u32, u32), Device)],
        patience: Option<Duration>,
        keep: Keep,
        session: &Session,
    ) -> Result<(), Failure> {
        let hung_up = || session.is_hung_up();
        let patience = Patience::new(patience).or_until(&hung_up);
        let mut unused = Vec::new();
        for (key, device) in devices {
            let pmem = &device.pmem;
            let begun = pmem.begin_unbind(&patience, afterwards(keep), |_| {});
            let unbinding = begun.map_err(|error| unbind_failure(&error, pmem))?;
            unused.push((*key, device, unbinding));
        }
        let mut done = Ok(());
        for (key, device, unbinding) in unused {
            let finished = unbinding.finish();
            let finished = finished.map_err(|error| unbind_failure(&error, &device.pmem));
            // It is out of use whatever was said, and so are the others.
            done = done.and(finished).and(self.forget(key, keep, device));
        }
        done
    }
}

fn client(session: &Session, label: impl Into<Cow<'static, str>>) -> Client {
    Client {
        label: label.into(),
        pid: session.pid().unwrap_or(0),
    }
}

fn bytes_of(range: &RangeOf, pmem: &Arc<Pmem>) -> core::ops::Range<u64> {
    let end = match range.length {
        Some(length) => range.offset.saturating_add(length),
        None => pmem.namespace().size_bytes(),
    };
    range.offset..end
}

fn access_failure(error: &AccessError) -> Failure {
    let code = match error {
        AccessError::NoFrames => Code::Unsupported,
        AccessError::Leaving | AccessError::TooMany | AccessError::Busy => Code::Busy,
        AccessError::OutOfRange | AccessError::NotAligned(_) | AccessError::NotShared => {
            Code::Invalid
        }
        AccessError::Bad { .. } | AccessError::NoRoom(_) => Code::Failed,
    };
    Failure::new(code, error)
}

fn unbind_failure(error: &UnbindError, pmem: &Pmem) -> Failure {
    if let UnbindError::Held(holders) = error {
        return Failure {
            code: Code::Busy,
            message: format!("{} is in use, and stays as it is", pmem.name()),
            holders: all(holders),
        };
    }
    Failure::new(Code::Failed, error)
}

/// Everybody who holds a device, requests included.
fn all(holders: &Holders) -> Vec<Holder> {
    let mut named: Vec<Holder> = holders
        .holds
        .iter()
        .map(|hold| holder(hold, holders.now_ns))
        .collect();
    // Who asks to map or pin at this moment has no name yet.
    let unnamed = if named.is_empty() {
        holders.references
    } else {
        0
    };
    for (kind, count) in [("request", holders.in_flight), ("references", unnamed)] {
        named.extend((count > 0).then(|| Holder {
            kind: kind.into(),
            label: format!("{count} under way"),
            pid: None,
            age_ms: None,
            offset: None,
            length: 0,
        }));
    }
    named
}

/// One who maps or pins, as the protocol says it.
pub(super) fn holder(hold: &Hold, now_ns: u64) -> Holder {
    let bytes = &hold.bytes;
    Holder {
        kind: match hold.kind {
            HoldKind::Mapped => "map".into(),
            HoldKind::Pinned => "pin".into(),
        },
        label: hold.label.to_string(),
        pid: hold.pid,
        age_ms: u64::try_from(hold.age(now_ns).as_millis()).ok(),
        offset: Some(bytes.start),
        length: bytes.end - bytes.start,
    }
}
