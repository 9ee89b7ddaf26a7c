use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc;

use super::*;
use crate::api::types::DeviceState;
use crate::service::guest::{DeviceLister, Exit, GuestError, Replacement, Unplugging};

/// Waits until `done` answers yes, and says what it waited for if it never does.
pub(crate) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "waited 20 s for {what}");
        std::thread::yield_now();
    }
}

type Notify = Mutex<Option<Box<dyn FnOnce(Exit) + Send>>>;

/// A machine without a KVM.
pub(crate) struct Fake {
    paused: bool,
    notify: Arc<Notify>,
    alive: Arc<AtomicBool>,
    stuck: bool,
    devices: Arc<Mutex<Vec<DeviceInfo>>>,
}

/// How many devices there were.
static PLUGGED: AtomicU32 = AtomicU32::new(0);

/// A device that goes when it is waited for, or does not.
struct FakeUnplugging {
    devices: Arc<Mutex<Vec<DeviceInfo>>>,
    device: DeviceInfo,
    heeds: bool,
}

impl Unplugging for FakeUnplugging {
    fn wait(self: Box<Self>, _: Duration) -> Result<DeviceInfo, ServiceError> {
        let mut devices = self.devices.lock().unwrap();
        if self.heeds {
            devices.retain(|device| device.number != self.device.number);
            return Ok(self.device);
        }
        devices.iter_mut().for_each(|device| device.state = DeviceState::Present);
        Err(ServiceError { code: ErrorCode::Deadline, message: format!("{} stays", self.device.name) })
    }
}

impl Fake {
    pub(crate) fn boxed() -> Box<dyn Guest> {
        Box::new(Self::new().0)
    }

    fn new() -> (Self, Arc<Notify>, Arc<AtomicBool>) {
        let (notify, alive) = (Arc::new(Mutex::new(None)), Arc::new(AtomicBool::new(true)));
        (
            Self { paused: true, notify: notify.clone(), alive: alive.clone(), stuck: false, devices: Arc::default() },
            notify,
            alive,
        )
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.alive.store(false, Ordering::SeqCst);
    }
}

impl Guest for Fake {
    fn hardware(&self) -> Hardware {
        Hardware { name: "fake".into(), ..Hardware::default() }
    }
    fn pause(&mut self, _: Duration) -> Result<(), GuestError> {
        if self.stuck {
            return Err("vCPU 0 did not come to rest".into());
        }
        self.paused = true;
        Ok(())
    }
    fn resume(&mut self) -> Result<(), GuestError> {
        self.paused = false;
        Ok(())
    }
    fn is_paused(&self) -> bool {
        self.paused
    }
    fn balloon(&mut self, size: Option<u64>) -> Result<BalloonInfo, ServiceError> {
        const MEMORY: u64 = 1 << 30;
        let size = size.unwrap_or(MEMORY);
        if size > MEMORY {
            return Err(ServiceError { code: ErrorCode::BadRequest, message: format!("{size} bytes are too many") });
        }
        Ok(BalloonInfo { memory: MEMORY, size, actual: MEMORY, ..BalloonInfo::default() })
    }
    fn devices(&self) -> DeviceLister {
        let devices = self.devices.clone();
        Arc::new(move || devices.lock().unwrap().clone())
    }
    fn plug(&mut self, device: &str) -> Result<DeviceInfo, ServiceError> {
        let plugged = DeviceInfo {
            number: u64::from(PLUGGED.fetch_add(1, Ordering::SeqCst)) + 1,
            name: device.into(),
            kind: "fake".into(),
            address: "00:01.0".into(),
            connected_to: String::new(),
            state: DeviceState::Present,
            removable: true,
        };
        self.devices.lock().unwrap().push(plugged.clone());
        Ok(plugged)
    }
    fn unplug(&mut self, name: &str) -> Result<Box<dyn Unplugging>, ServiceError> {
        let mut devices = self.devices.lock().unwrap();
        let Some(device) = devices.iter_mut().find(|device| device.name == name) else {
            return Err(ServiceError { code: ErrorCode::NotFound, message: format!("there is no {name}") });
        };
        device.state = DeviceState::Unplugging;
        Ok(Box::new(FakeUnplugging { devices: self.devices.clone(), device: device.clone(), heeds: !self.stuck }))
    }
    fn on_exit(&self, notify: Box<dyn FnOnce(Exit) + Send>) {
        *self.notify.lock().unwrap() = Some(notify);
    }
}

/// A journey that ends when it is told to.
#[derive(Default)]
pub(crate) struct FakeJourney {
    job: Mutex<Job>,
    changed: Condvar,
}

impl FakeJourney {
    fn change(&self, change: impl FnOnce(&mut Job)) {
        change(&mut self.job.lock().unwrap());
        self.changed.notify_all();
    }

    fn wait_until(&self, done: impl Fn(Phase) -> bool) -> Phase {
        let mut job = self.job.lock().unwrap();
        while !done(job.phase) {
            let (next, timeout) = self.changed.wait_timeout(job, Duration::from_secs(20)).unwrap();
            assert!(!timeout.timed_out(), "waited 20 s for the test to end the journey");
            job = next;
        }
        job.phase
    }
}

impl Journey for FakeJourney {
    fn job(&self) -> Job {
        self.job.lock().unwrap().clone()
    }
    fn phases(&self) -> Vec<Phase> {
        vec![Phase::None, Phase::Setup, self.job().phase]
    }
    fn cancel(&self) -> Result<(), String> {
        if self.job().phase != Phase::Precopy {
            return Err("too late".into());
        }
        self.change(|job| {
            job.phase = Phase::Cancelled;
            job.error = Some("cancelled".into());
        });
        Ok(())
    }
    fn resolve(&self, side: Side) -> Result<(), String> {
        self.change(|job| job.phase = if side == Side::Source { Phase::Failed } else { Phase::Done });
        Ok(())
    }
    fn switch(&self) -> Result<(), String> {
        self.change(|job| job.phase = Phase::Postcopy);
        Ok(())
    }
    fn recover(&self, to: Option<Endpoint>) -> Result<(), String> {
        if self.job().phase != Phase::Paused {
            return Err("nothing is lost".into());
        }
        self.change(|job| {
            job.peer = to.map_or(job.peer.clone(), |to| to.to_string());
            job.phase = Phase::Postcopy;
        });
        Ok(())
    }
    fn recover_at(&self, listen: &Endpoint) -> Result<(), String> {
        self.change(|job| job.peer = listen.to_string());
        Ok(())
    }
    fn vm_ended(&self, why: &str) {
        self.change(|job| {
            job.phase = Phase::Failed;
            job.error = Some(why.into());
        });
    }
}

#[derive(Default)]
pub(crate) struct FakeEngine {
    last: Arc<Mutex<Option<Arc<FakeJourney>>>>,
}

impl FakeEngine {
    fn last(&self) -> Arc<FakeJourney> {
        self.last.lock().unwrap().clone().expect("a journey")
    }
    pub(crate) fn phase(&self) -> Phase {
        self.last().job().phase
    }
    pub(crate) fn set(&self, change: impl FnOnce(&mut Job)) {
        self.last().change(change);
    }
    pub(crate) fn finish(&self, phase: Phase) {
        self.set(|job| job.phase = phase);
    }
}

impl Engine for FakeEngine {
    fn depart(&self, request: &MigrationRequest) -> Result<Box<dyn Departure>, String> {
        if !request.to.starts_with("tcp:") {
            return Err(format!("{:?} is no address", request.to));
        }
        let journey = Arc::new(FakeJourney::default());
        journey.change(|job| {
            job.peer = request.to.clone();
            job.attempt = "a1".into();
            job.phase = Phase::Precopy;
        });
        Ok(Box::new(FakeDeparture { engine_last: journey.clone(), publish: Some(self.publish(journey)) }))
    }

    fn update(&self, request: &UpdateRequest) -> Result<Box<dyn Replacement>, String> {
        if request.binary.as_deref() == Some("wherry") {
            return Err("\"wherry\" is no absolute path".into());
        }
        let journey = Arc::new(FakeJourney::default());
        journey.change(|job| job.phase = Phase::Precopy);
        let last = self.last.clone();
        Ok(Box::new(FakeReplacement { journey, last }))
    }
}

struct FakeReplacement {
    journey: Arc<FakeJourney>,
    last: Arc<Mutex<Option<Arc<FakeJourney>>>>,
}

impl Replacement for FakeReplacement {
    fn journey(&self) -> Arc<dyn Journey> {
        // Asked only when it begins.
        *self.last.lock().unwrap() = Some(self.journey.clone());
        self.journey.clone()
    }
    fn run(self: Box<Self>, guest: Box<dyn Guest>, hold: &dyn Fn(bool)) -> Updated {
        hold(true);
        match self.journey.wait_until(|p| matches!(p, Phase::Done | Phase::Failed | Phase::Cancelled)) {
            Phase::Done => {
                std::mem::forget(guest);
                Updated::Replaced { pid: 7, trouble: self.journey.job().error }
            }
            phase => {
                hold(false);
                let why = format!("it {phase:?}");
                Updated::Kept { guest, why, refused: false }
            }
        }
    }
}

impl FakeEngine {
    fn publish(&self, journey: Arc<FakeJourney>) -> Arc<FakeJourney> {
        *self.last.lock().unwrap() = Some(journey.clone());
        journey
    }
}

struct FakeDeparture {
    engine_last: Arc<FakeJourney>,
    publish: Option<Arc<FakeJourney>>,
}

impl Departure for FakeDeparture {
    fn journey(&self) -> Arc<dyn Journey> {
        self.engine_last.clone()
    }
    fn run(mut self: Box<Self>, guest: Box<dyn Guest>) -> Sent {
        let journey = self.publish.take().expect("run once");
        match journey.wait_until(|p| matches!(p, Phase::Done | Phase::Failed | Phase::Cancelled)) {
            Phase::Done => Sent::Gone,
            _ => Sent::Kept(guest),
        }
    }
}

fn request() -> MigrationRequest {
    serde_json::from_value(serde_json::json!({"to": "tcp:h:1"})).unwrap()
}

fn running(policy: Policy) -> (Arc<Service>, Arc<FakeEngine>, Arc<Notify>, Arc<AtomicBool>) {
    let engine = Arc::new(FakeEngine::default());
    let service = Service::new(engine.clone(), policy);
    let (fake, notify, alive) = Fake::new();
    service.start(Box::new(fake), false).unwrap();
    (service, engine, notify, alive)
}

fn exit(notify: &Notify, exit: Exit) {
    let notify = notify.lock().unwrap().take().expect("somebody listens for the exit");
    notify(exit);
}

#[test]
fn a_vm_that_has_moved_ends_the_process_once_the_result_was_read() {
    let (service, engine, _, alive) = running(Policy::default());
    service.migrate(&request()).unwrap();
    engine.finish(Phase::Done);
    wait_for("the VM to have moved", || service.info().state == VmState::Moved);
    assert_eq!(service.ending(), None);
    service.result_was_read();
    assert_eq!(service.wait_for_end().status, 0);
    assert!(!alive.load(Ordering::SeqCst));
}

#[test]
fn a_lingering_process_stays_until_it_is_stopped() {
    let (service, engine, ..) = running(Policy { linger: true, ..Policy::default() });
    service.migrate(&request()).unwrap();
    engine.finish(Phase::Done);
    wait_for("the VM to have moved", || service.info().state == VmState::Moved);
    service.result_was_read();
    assert_eq!(service.ending(), None);
    assert_eq!(service.job().phase, Phase::Done);
    service.stop(false).unwrap();
    assert_eq!(service.wait_for_end().status, 0);
}

#[test]
fn a_failed_migration_leaves_the_vm_as_it_was_and_says_why() {
    let (service, engine, ..) = running(Policy::default());
    service.pause().unwrap();
    service.migrate(&request()).unwrap();
    engine.set(|job| {
        job.error = Some("the link broke".into());
        job.phase = Phase::Failed;
    });
    wait_for("the VM to be back", || service.info().state == VmState::Paused);
    assert!(service.info().reason.unwrap().contains("the link broke"));
    service.resume().unwrap();
    assert_eq!(service.info().state, VmState::Running);
}

#[test]
fn a_vm_in_doubt_is_neither_stopped_nor_cancelled_and_can_be_resolved() {
    let (service, engine, _, alive) = running(Policy::default());
    service.migrate(&request()).unwrap();
    engine.finish(Phase::InDoubt);
    assert_eq!(service.info().state, VmState::InDoubt);
    assert_eq!(service.stop(false).unwrap_err().code, ErrorCode::WrongState);
    assert_eq!(service.cancel().unwrap_err().code, ErrorCode::WrongState);
    assert!(alive.load(Ordering::SeqCst));
    service.resolve(Side::Source).unwrap();
    wait_for("the VM to run here again", || service.info().state == VmState::Running);
}

#[test]
fn a_stop_cancels_a_migration_under_way_first() {
    let (service, engine, _, alive) = running(Policy::default());
    service.migrate(&request()).unwrap();
    service.stop(false).unwrap();
    assert_eq!(engine.phase(), Phase::Cancelled);
    assert_eq!(service.wait_for_end().status, 0);
    assert!(!alive.load(Ordering::SeqCst));
}

/// An update under way, in a thread of its own.
fn updating(service: &Arc<Service>) -> std::thread::JoinHandle<Result<UpdateInfo, ServiceError>> {
    let asked = service.clone();
    let thread = std::thread::spawn(move || asked.update(&UpdateRequest::default()));
    wait_for("the update to have begun", || service.info().state == VmState::Updating);
    thread
}

#[test]
fn a_vm_that_a_new_process_has_taken_ends_this_one_without_being_ended() {
    let (service, engine, _, alive) = running(Policy::default());
    let update = updating(&service);
    wait_for("clients to be held off", || !*service.accepts().borrow());
    assert!(service.pause().unwrap_err().message.contains("take it over"));
    assert!(service.update(&UpdateRequest::default()).unwrap_err().message.contains("take it over"));
    engine.finish(Phase::Done);
    let info = update.join().unwrap().unwrap();
    assert_eq!((info.pid, info.job.phase), (7, Phase::Done));
    let ending = service.wait_for_end();
    assert!(ending.replaced && ending.status == 0 && ending.message.contains("process 7"), "{ending:?}");
    assert_eq!(service.info().state, VmState::Updated);
    assert!(alive.load(Ordering::SeqCst), "what is the new process's was taken down");
    let error = service.stop(false).unwrap_err();
    assert!(error.message.contains("process 7"), "a stop would have been told to have happened: {error}");
}

#[test]
fn an_update_that_fails_or_is_cancelled_leaves_the_vm_here_and_says_why() {
    let (service, engine, _, alive) = running(Policy::default());
    for phase in [Phase::Failed, Phase::Cancelled] {
        let update = updating(&service);
        match phase {
            Phase::Cancelled => drop(service.cancel().unwrap()),
            phase => engine.finish(phase),
        }
        let error = update.join().unwrap().unwrap_err();
        assert!(error.code == ErrorCode::Failed && error.message.contains(&format!("{phase:?}")), "{error}");
        assert_eq!(service.info().state, VmState::Running);
        assert!(service.info().reason.unwrap().contains("the last update did not happen"));
        assert!(*service.accepts().borrow(), "clients are held off for ever");
    }
    let request = UpdateRequest { binary: Some("wherry".into()), ..UpdateRequest::default() };
    assert_eq!(service.update(&request).unwrap_err().code, ErrorCode::BadRequest);
    assert!(alive.load(Ordering::SeqCst) && service.ending().is_none());
}

#[test]
fn a_new_process_that_takes_the_vm_and_fails_is_told_of_and_this_one_ends_with_an_error() {
    let (service, engine, ..) = running(Policy::default());
    let update = updating(&service);
    engine.set(|job| job.error = Some("it hangs".into()));
    engine.finish(Phase::Done);
    assert!(update.join().unwrap().unwrap_err().message.contains("it hangs"));
    let ending = service.wait_for_end();
    assert!(ending.replaced && ending.status == 1, "{ending:?}");
}

#[test]
fn a_guest_that_ends_and_a_user_who_stops_it_are_heard_in_the_middle_of_an_update() {
    let (service, _, notify, alive) = running(Policy::default());
    let update = updating(&service);
    exit(&notify, Exit::PowerOff);
    assert!(update.join().unwrap().is_err());
    assert_eq!(service.wait_for_end().message, "the guest has powered off");
    assert!(!alive.load(Ordering::SeqCst));

    let (service, _, _, alive) = running(Policy::default());
    let update = updating(&service);
    service.stop(false).unwrap();
    assert!(update.join().unwrap().is_err());
    assert_eq!(service.wait_for_end().status, 0);
    assert!(!alive.load(Ordering::SeqCst));
}

#[test]
fn power_off_and_crash_end_the_process_with_their_statuses() {
    let (service, _, notify, _) = running(Policy::default());
    exit(&notify, Exit::PowerOff);
    assert_eq!(
        service.wait_for_end(),
        Ending { status: 0, message: "the guest has powered off".into(), replaced: false }
    );
    let (service, _, notify, _) = running(Policy::default());
    exit(&notify, Exit::Crash("triple fault on vCPU 0".into()));
    let ending = service.wait_for_end();
    assert!(ending.status == 1 && ending.message.contains("triple fault"), "{ending:?}");
    assert_eq!(service.info().state, VmState::Crashed);
}

#[test]
fn a_reset_boots_again_where_there_is_something_to_boot_and_ends_the_process_elsewhere() {
    let boots = Arc::new(AtomicU32::new(0));
    let (tx, rx) = mpsc::channel();
    let count = boots.clone();
    let reboot: Reboot = Box::new(move || {
        count.fetch_add(1, Ordering::SeqCst);
        let (fake, notify, _) = Fake::new();
        tx.send(notify).unwrap();
        Ok(Box::new(fake))
    });
    let (service, _, notify, alive) = running(Policy { reboot: Some(reboot), ..Policy::default() });
    exit(&notify, Exit::Reset);
    wait_for("the second boot", || service.info().state == VmState::Running);
    assert!(!alive.load(Ordering::SeqCst), "the first machine is gone before the second is made");
    exit(&rx.recv().unwrap(), Exit::PowerOff);
    assert_eq!(service.wait_for_end().status, 0);
    assert_eq!(boots.load(Ordering::SeqCst), 1);

    let (service, _, notify, _) = running(Policy::default());
    exit(&notify, Exit::Reset);
    assert!(service.wait_for_end().message.contains("no kernel"));
}

#[test]
fn a_guest_that_ends_while_it_migrates_is_called_back_and_ended_here() {
    let (service, engine, notify, _) = running(Policy::default());
    service.migrate(&request()).unwrap();
    exit(&notify, Exit::PowerOff);
    assert_eq!(service.wait_for_end().message, "the guest has powered off");
    assert_eq!(engine.phase(), Phase::Cancelled);
}

#[test]
fn a_vm_that_does_not_come_to_rest_runs_on() {
    let engine = Arc::new(FakeEngine::default());
    let service = Service::new(engine, Policy::default());
    let (mut fake, ..) = Fake::new();
    fake.stuck = true;
    service.start(Box::new(fake), false).unwrap();
    let error = service.pause().unwrap_err();
    assert!(error.message.contains("did not come to rest; it runs on"), "{error}");
    assert_eq!(service.info().state, VmState::Running);
}

#[test]
fn a_bad_address_is_refused_before_the_vm_is_touched() {
    let (service, ..) = running(Policy::default());
    let error = service.migrate(&MigrationRequest { to: "nowhere".into(), ..request() }).unwrap_err();
    assert_eq!(error.code, ErrorCode::BadRequest);
    assert_eq!(service.info().state, VmState::Running);
}

#[test]
fn a_receiver_listens_on_after_a_failed_arrival_and_keeps_the_vm_that_arrives() {
    let service = Service::new(Arc::new(FakeEngine::default()), Policy::default());
    service.listen("tcp:h:1".into());
    let journey = Arc::new(FakeJourney::default());
    service.arriving(journey.clone());
    assert_eq!(service.info().state, VmState::Receiving);
    assert!(service.arrival(Received::Refused("the source went away".into()), false));
    let info = service.info();
    assert!(info.state == VmState::Listening && info.reason.unwrap().contains("went away"));
    service.arriving(journey);
    assert!(!service.arrival(
        Received::Arrived({
            let (mut fake, ..) = Fake::new();
            fake.paused = false;
            Box::new(fake)
        }),
        false
    ));
    assert_eq!(service.info().state, VmState::Running);
    service.stop(false).unwrap();
}

#[test]
fn a_receiver_that_is_stopped_while_it_listens_ends_at_once() {
    let service = Service::new(Arc::new(FakeEngine::default()), Policy::default());
    service.listen("tcp:h:1".into());
    service.stop(false).unwrap();
    assert_eq!(service.wait_for_end().status, 0);
}

/// A receiver whose VM runs while its memory follows.
fn followed() -> (Arc<Service>, Arc<FakeJourney>, Arc<Notify>, Arc<AtomicBool>) {
    let service = Service::new(Arc::new(FakeEngine::default()), Policy::default());
    let journey = Arc::new(FakeJourney::default());
    journey.change(|job| {
        job.phase = Phase::Postcopy;
        job.role = "destination".into();
        job.peer = "the source".into();
    });
    service.listen("tcp:h:1".into());
    service.arriving(journey.clone());
    let (mut fake, notify, alive) = Fake::new();
    fake.paused = false;
    service.runs(Box::new(fake));
    (service, journey, notify, alive)
}

/// What the receiving thread does when the journey ends.
fn arrival_of(service: &Arc<Service>, journey: &Arc<FakeJourney>) -> std::thread::JoinHandle<()> {
    let (service, journey) = (service.clone(), journey.clone());
    std::thread::spawn(move || {
        let received = match journey.wait_until(|p| matches!(p, Phase::Done | Phase::Failed)) {
            Phase::Done => Received::Whole,
            _ => Received::Lost { why: journey.job().error.unwrap_or_default(), in_doubt: false },
        };
        assert!(!service.arrival(received, false), "a process that has had a VM listens for another one");
    })
}

#[test]
fn a_vm_whose_memory_follows_can_be_paused_and_not_sent_on() {
    let (service, journey, ..) = followed();
    assert_eq!(service.info().state, VmState::Running);
    assert_eq!(service.job().phase, Phase::Postcopy);
    service.pause().unwrap();
    assert_eq!(service.info().state, VmState::Paused);
    service.resume().unwrap();
    let refused = service.migrate(&request()).unwrap_err();
    assert!(refused.message.contains("still coming from the source"), "{refused}");
    let end = arrival_of(&service, &journey);
    journey.change(|job| job.phase = Phase::Done);
    end.join().unwrap();
    assert_eq!((service.info().state, service.info().reason), (VmState::Running, None));
    service.migrate(&request()).unwrap();
}

#[test]
fn a_vm_whose_memory_follows_is_ended_before_its_source_is_told() {
    for by_user in [true, false] {
        let (service, journey, notify, alive) = followed();
        let end = arrival_of(&service, &journey);
        if by_user {
            service.stop(false).unwrap();
        } else {
            exit(&notify, Exit::PowerOff);
        }
        let ending = service.wait_for_end();
        assert_eq!(ending.status, 0, "{ending:?}");
        assert!(!alive.load(Ordering::SeqCst));
        let told = journey.job().error.expect("the journey was not told");
        assert!(told.contains(if by_user { "its user has ended it" } else { "powered off" }), "{told}");
        end.join().unwrap();
        assert_eq!(service.info().state, VmState::Stopped);
    }
}

#[test]
fn a_vm_that_is_lost_while_its_memory_follows_ends_the_process_and_says_why() {
    let (service, journey, _, alive) = followed();
    let end = arrival_of(&service, &journey);
    journey.vm_ended("the source's process has died");
    end.join().unwrap();
    let ending = service.wait_for_end();
    assert!(ending.status == 1 && ending.message.contains("has died"), "{ending:?}");
    wait_for("the machine to be gone", || !alive.load(Ordering::SeqCst));
}

#[test]
fn a_source_that_a_vm_elsewhere_needs_is_stopped_only_by_force() {
    let (service, engine, ..) = running(Policy::default());
    service.migrate(&request()).unwrap();
    for phase in [Phase::Postcopy, Phase::Paused] {
        engine.finish(phase);
        let refused = service.stop(false).unwrap_err();
        assert!(refused.code == ErrorCode::WrongState && refused.message.contains("--force"), "{refused}");
    }
    service.stop(true).unwrap();
    let ending = service.wait_for_end();
    assert!(ending.status == 3 && ending.message.contains("by force"), "{ending:?}");
    engine.finish(Phase::Done);
}

#[test]
fn a_lost_link_is_taken_up_from_the_end_that_can() {
    let recover = |to: Option<&str>, listen: Option<&str>| RecoverRequest {
        to: to.map(String::from),
        listen: listen.map(String::from),
    };
    let (service, engine, ..) = running(Policy::default());
    assert_eq!(service.recover(&recover(None, None)).unwrap_err().code, ErrorCode::WrongState);
    assert_eq!(service.switch().unwrap_err().code, ErrorCode::WrongState);
    service.migrate(&request()).unwrap();
    assert_eq!(service.recover(&recover(None, None)).unwrap_err().code, ErrorCode::WrongState, "nothing is lost");
    assert_eq!(service.switch().unwrap().phase, Phase::Postcopy);
    engine.finish(Phase::Paused);
    assert_eq!(service.recover(&recover(Some("nowhere"), None)).unwrap_err().code, ErrorCode::BadRequest);
    assert_eq!(service.recover(&recover(None, Some("tcp:h:2"))).unwrap_err().code, ErrorCode::WrongState);
    assert_eq!(service.recover(&recover(Some("tcp:h:2"), None)).unwrap().peer, "tcp:h:2");
    engine.finish(Phase::Done);

    let (service, journey, ..) = followed();
    assert_eq!(service.recover(&recover(None, None)).unwrap_err().code, ErrorCode::WrongState);
    assert_eq!(service.recover(&recover(None, Some("tcp:h:3"))).unwrap().peer, "tcp:h:3");
    let end = arrival_of(&service, &journey);
    journey.change(|job| job.phase = Phase::Done);
    end.join().unwrap();
}
