//! The routes, and the thread that serves them.

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response, Sse, sse};
use axum::routing::{MethodRouter, get, put};
use axum::{Json, Router};
use futures_util::Stream;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;
use wherry_migration::progress::{Job, Phase};

use super::types::{
    BalloonInfo, BalloonRequest, DeviceAddRequest, DeviceChange, DeviceEvent, DeviceInfo, DeviceRemoveRequest,
    DeviceState, ErrorBody, ErrorCode, ErrorInfo, MigrationRequest, PhaseEvent, Ping, RecoverRequest, ResolveRequest,
    StopRequest, UpdateInfo, UpdateRequest, VmInfo, VmState,
};
use super::{BASE, OPENAPI};
use crate::service::{Service, ServiceError};

/// Largest body that is read, in bytes.
pub const MAX_BODY: usize = 64 << 10;
/// How often the events look at the job while a journey is under way.
const TICK: Duration = Duration::from_millis(100);
/// How long connections may take to end when the server does.
const GRACE: Duration = Duration::from_secs(2);

type Shared = State<Arc<Service>>;

/// Every route: method, path below [`BASE`], handler. The description is compared with this list.
pub(super) fn routes() -> Vec<(&'static str, &'static str, MethodRouter<Arc<Service>>)> {
    vec![
        ("get", "/ping", get(ping)),
        ("get", "/openapi.json", get(openapi)),
        ("get", "/vm", get(vm)),
        ("put", "/vm/pause", put(pause)),
        ("put", "/vm/resume", put(resume)),
        ("put", "/vm/stop", put(stop)),
        ("put", "/vm/update", put(update)),
        ("get", "/balloon", get(balloon)),
        ("put", "/balloon", put(set_balloon)),
        ("get", "/devices", get(devices)),
        ("put", "/devices/add", put(add_device)),
        ("put", "/devices/remove", put(remove_device)),
        ("get", "/migration", get(job)),
        ("put", "/migration", put(migrate)),
        ("put", "/migration/cancel", put(cancel)),
        ("put", "/migration/resolve", put(resolve)),
        ("put", "/migration/switch", put(switch)),
        ("put", "/migration/recover", put(recover)),
        ("get", "/events", get(events)),
    ]
}

/// The API as a router.
pub fn router(service: Arc<Service>) -> Router {
    let mut router = Router::new();
    for (_, path, handler) in routes() {
        router = router.route(&format!("{BASE}{path}"), handler);
    }
    router.method_not_allowed_fallback(method_not_allowed).fallback(not_found).with_state(service)
}

/// The listener, which takes nobody in while a new process may be about to.
struct Gate {
    listener: tokio::net::UnixListener,
    open: tokio::sync::watch::Receiver<bool>,
}

impl axum::serve::Listener for Gate {
    type Io = tokio::net::UnixStream;
    type Addr = tokio::net::unix::SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            // The service outlives the server.
            let _ = self.open.wait_for(|open| *open).await;
            tokio::select! {
                biased;
                _ = self.open.wait_for(|open| !*open) => {}
                accepted = axum::serve::Listener::accept(&mut self.listener) => return accepted,
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

/// The thread that serves the API.
pub struct Server {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `service` on `listener` from a thread of its own.
    pub fn start(listener: UnixListener, service: Arc<Service>) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .thread_name("api-worker")
            .max_blocking_threads(16)
            .build()?;
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::Builder::new().name("api".into()).spawn(move || {
            let served = runtime.block_on(async {
                let listener = tokio::net::UnixListener::from_std(listener)?;
                let (begin_grace, grace) = oneshot::channel();
                let stopped = async move {
                    let _ = stopped.await;
                    let _ = begin_grace.send(());
                };
                let listener = Gate { listener, open: service.accepts() };
                let serve = axum::serve(listener, router(service)).with_graceful_shutdown(stopped);
                let limit = async move {
                    let _ = grace.await;
                    tokio::time::sleep(GRACE).await;
                };
                tokio::select! {
                    result = serve => result,
                    () = limit => Ok(()),
                }
            });
            if let Err(error) = served {
                tracing::error!(%error, "the API is no longer served");
            }
            // A worker that hangs in the kernel must not hold up the end of the process.
            runtime.shutdown_background();
        })?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }

    /// Answers what has been asked, takes nothing new and ends within two seconds.
    pub fn stop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the API thread has panicked; this is a bug in Wherry");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

// ---- errors and bodies ----

impl IntoResponse for ServiceError {
    fn into_response(self) -> Response {
        let status = match self.code {
            ErrorCode::BadRequest => StatusCode::BAD_REQUEST,
            ErrorCode::NotFound => StatusCode::NOT_FOUND,
            ErrorCode::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            ErrorCode::WrongState => StatusCode::CONFLICT,
            ErrorCode::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            ErrorCode::Deadline => StatusCode::GATEWAY_TIMEOUT,
            ErrorCode::Failed => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let body = ErrorBody { error: ErrorInfo { code: self.code, message: self.message } };
        (status, Json(body)).into_response()
    }
}

/// A JSON body of bounded size. Its errors say what is wrong and where.
struct JsonBody<T>(T);

impl<T: DeserializeOwned> FromRequest<Arc<Service>> for JsonBody<T> {
    type Rejection = ServiceError;

    async fn from_request(request: Request, _: &Arc<Service>) -> Result<Self, ServiceError> {
        let bytes = read(request).await?;
        parse(&bytes).map(Self)
    }
}

/// A JSON body, or none, which means all defaults.
struct OptionalBody<T>(T);

impl<T: DeserializeOwned + Default> FromRequest<Arc<Service>> for OptionalBody<T> {
    type Rejection = ServiceError;

    async fn from_request(request: Request, _: &Arc<Service>) -> Result<Self, ServiceError> {
        let bytes = read(request).await?;
        if bytes.trim_ascii().is_empty() {
            return Ok(Self(T::default()));
        }
        parse(&bytes).map(Self)
    }
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ServiceError> {
    serde_json::from_slice(bytes).map_err(|e| ServiceError {
        code: ErrorCode::BadRequest,
        message: format!("reading the JSON body of the request: {e}"),
    })
}

/// No body, or an empty object.
struct NoBody;

impl FromRequest<Arc<Service>> for NoBody {
    type Rejection = ServiceError;

    async fn from_request(request: Request, _: &Arc<Service>) -> Result<Self, ServiceError> {
        let bytes = read(request).await?;
        let text = bytes.trim_ascii();
        if text.is_empty() || text == b"{}" {
            return Ok(Self);
        }
        Err(ServiceError { code: ErrorCode::BadRequest, message: "this request takes no body".into() })
    }
}

async fn read(request: Request) -> Result<Bytes, ServiceError> {
    let too_large = || ServiceError {
        code: ErrorCode::TooLarge,
        message: format!("the body of the request has more than {MAX_BODY} bytes"),
    };
    let announced = request.headers().get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|n| n > MAX_BODY as u64) {
        return Err(too_large());
    }
    // A client that announces a body and sends none holds a connection and nothing else; but not for ever.
    let body = axum::body::to_bytes(request.into_body(), MAX_BODY);
    match tokio::time::timeout(Duration::from_secs(10), body).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(_)) => Err(too_large()),
        Err(_) => Err(ServiceError {
            code: ErrorCode::Deadline,
            message: "the body of the request did not arrive within 10 s".into(),
        }),
    }
}

/// Runs what may block on a worker thread.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ServiceError> + Send + 'static,
) -> Result<T, ServiceError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| {
        Err(ServiceError { code: ErrorCode::Failed, message: format!("the request was not finished: {e}") })
    })
}

async fn not_found(request: Request) -> ServiceError {
    ServiceError {
        code: ErrorCode::NotFound,
        message: format!("there is no {}; GET {BASE}/openapi.json lists what there is", request.uri().path()),
    }
}

async fn method_not_allowed(request: Request) -> ServiceError {
    ServiceError {
        code: ErrorCode::MethodNotAllowed,
        message: format!("{} does not take {}", request.uri().path(), request.method()),
    }
}

// ---- handlers ----

async fn ping() -> Json<Ping> {
    Json(Ping { program: "wherry".into(), version: env!("CARGO_PKG_VERSION").into(), pid: std::process::id() })
}

async fn openapi() -> Response {
    let mut response = Response::new(Body::from(OPENAPI));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

async fn vm(State(service): Shared) -> Json<VmInfo> {
    Json(service.info())
}

async fn pause(State(service): Shared, _: NoBody) -> Result<Json<VmInfo>, ServiceError> {
    blocking(move || service.pause()).await.map(Json)
}

async fn resume(State(service): Shared, _: NoBody) -> Result<Json<VmInfo>, ServiceError> {
    blocking(move || service.resume()).await.map(Json)
}

async fn stop(
    State(service): Shared,
    OptionalBody(request): OptionalBody<StopRequest>,
) -> Result<Json<VmInfo>, ServiceError> {
    blocking(move || service.stop(request.force)).await.map(Json)
}

async fn balloon(State(service): Shared) -> Result<Json<BalloonInfo>, ServiceError> {
    blocking(move || service.balloon(None)).await.map(Json)
}

async fn set_balloon(
    State(service): Shared,
    JsonBody(request): JsonBody<BalloonRequest>,
) -> Result<Json<BalloonInfo>, ServiceError> {
    blocking(move || service.balloon(Some(request.size))).await.map(Json)
}

async fn devices(State(service): Shared) -> Json<Vec<DeviceInfo>> {
    Json(service.devices())
}

async fn add_device(
    State(service): Shared,
    JsonBody(request): JsonBody<DeviceAddRequest>,
) -> Result<Json<DeviceInfo>, ServiceError> {
    blocking(move || service.plug(&request.device)).await.map(Json)
}

async fn remove_device(
    State(service): Shared,
    JsonBody(request): JsonBody<DeviceRemoveRequest>,
) -> Result<Json<DeviceInfo>, ServiceError> {
    blocking(move || service.unplug(&request)).await.map(Json)
}

async fn update(
    State(service): Shared,
    OptionalBody(request): OptionalBody<UpdateRequest>,
) -> Result<Json<UpdateInfo>, ServiceError> {
    blocking(move || service.update(&request)).await.map(Json)
}

async fn job(State(service): Shared) -> Json<Job> {
    let job = service.job();
    if is_over(job.phase) {
        service.result_was_read();
    }
    Json(job)
}

async fn migrate(
    State(service): Shared,
    JsonBody(request): JsonBody<MigrationRequest>,
) -> Result<(StatusCode, Json<Job>), ServiceError> {
    let job = blocking(move || service.migrate(&request)).await?;
    Ok((StatusCode::ACCEPTED, Json(job)))
}

async fn cancel(State(service): Shared, _: NoBody) -> Result<(StatusCode, Json<Job>), ServiceError> {
    let job = blocking(move || service.cancel()).await?;
    Ok((StatusCode::ACCEPTED, Json(job)))
}

async fn resolve(
    State(service): Shared,
    JsonBody(request): JsonBody<ResolveRequest>,
) -> Result<(StatusCode, Json<Job>), ServiceError> {
    let job = blocking(move || service.resolve(request.side)).await?;
    Ok((StatusCode::ACCEPTED, Json(job)))
}

async fn switch(State(service): Shared, _: NoBody) -> Result<(StatusCode, Json<Job>), ServiceError> {
    let job = blocking(move || service.switch()).await?;
    Ok((StatusCode::ACCEPTED, Json(job)))
}

async fn recover(
    State(service): Shared,
    OptionalBody(request): OptionalBody<RecoverRequest>,
) -> Result<(StatusCode, Json<Job>), ServiceError> {
    let job = blocking(move || service.recover(&request)).await?;
    Ok((StatusCode::ACCEPTED, Json(job)))
}

/// Whether a phase is the last of its journey.
pub fn is_over(phase: Phase) -> bool {
    matches!(phase, Phase::Done | Phase::Cancelled | Phase::Failed)
}

// ---- events ----

/// What a stream of events has told so far.
struct Told {
    service: Arc<Service>,
    changes: tokio::sync::watch::Receiver<u64>,
    state: Option<(VmState, Phase, String)>,
    phases: usize,
    rounds: usize,
    job: Option<Job>,
    devices: Vec<DeviceInfo>,
    waiting: std::collections::VecDeque<sse::Event>,
    ended: bool,
}

async fn events(State(service): Shared) -> Sse<impl Stream<Item = Result<sse::Event, axum::Error>>> {
    let told = Told {
        changes: service.watch(),
        service,
        state: None,
        phases: 0,
        rounds: 0,
        job: None,
        devices: Vec::new(),
        waiting: Default::default(),
        ended: false,
    };
    let stream = futures_util::stream::unfold(told, async |mut told| {
        loop {
            if let Some(event) = told.waiting.pop_front() {
                return Some((Ok(event), told));
            }
            if told.ended {
                return None;
            }
            if told.state.is_some() {
                let _ = tokio::time::timeout(TICK, told.changes.changed()).await;
            }
            told.look();
        }
    });
    Sse::new(stream).keep_alive(sse::KeepAlive::new().interval(Duration::from_secs(15)))
}

/// What has become of devices, those that have gone first.
pub(super) fn changes(before: &[DeviceInfo], now: &[DeviceInfo]) -> Vec<(DeviceChange, DeviceInfo)> {
    let find = |list: &[DeviceInfo], number| list.iter().find(|device| device.number == number).cloned();
    let gone = before.iter().filter(|device| find(now, device.number).is_none());
    let gone = gone.map(|device| (DeviceChange::Removed, device.clone()));
    let others = now.iter().filter_map(|device| {
        let was = find(before, device.number).map(|was| was.state);
        let change = match (was, device.state) {
            (None, _) => DeviceChange::Added,
            (Some(was), now) if was == now => return None,
            (_, DeviceState::Present) => DeviceChange::Stays,
            (_, DeviceState::Unplugging) => DeviceChange::Unplugging,
            (_, DeviceState::Ejected) => DeviceChange::Ejected,
        };
        Some((change, device.clone()))
    });
    gone.chain(others).collect()
}

impl Told {
    /// Compares the service with what was told and queues the news.
    fn look(&mut self) {
        self.ended = self.service.ending().is_some();
        let (info, job) = (self.service.info(), self.service.job());
        let state = (info.state, job.phase, job.attempt.clone());
        // A journey has no attempt id before its source has chosen one.
        let new_job = self.job.as_ref().is_some_and(|old| !old.attempt.is_empty() && old.attempt != job.attempt);
        if new_job {
            (self.phases, self.rounds) = (0, 0);
        }
        // Phases may be shorter than a tick. The one that is told below is the last of them.
        let phases = self.service.phases();
        for phase in phases.iter().skip(self.phases).filter(|phase| **phase != job.phase) {
            let (phase, attempt) = (*phase, job.attempt.clone());
            self.queue("phase", &PhaseEvent { state: info.state, phase, attempt, reason: None });
        }
        self.phases = phases.len();
        for round in job.rounds.iter().skip(self.rounds) {
            self.queue("round", round);
        }
        self.rounds = job.rounds.len();
        if self.state.as_ref() != Some(&state) {
            let phase = PhaseEvent {
                state: info.state,
                phase: job.phase,
                attempt: job.attempt.clone(),
                reason: info.reason.or_else(|| job.error.clone()),
            };
            self.queue("phase", &phase);
            self.state = Some(state);
        }
        let devices = self.service.devices();
        for (change, device) in changes(&self.devices, &devices) {
            self.queue("device", &DeviceEvent { change, device });
        }
        self.devices = devices;
        if self.job.as_ref() != Some(&job) {
            self.queue("job", &job);
            if is_over(job.phase) {
                self.service.result_was_read();
            }
            self.job = Some(job);
        }
    }

    fn queue(&mut self, name: &str, data: &impl Serialize) {
        match sse::Event::default().event(name).json_data(data) {
            Ok(event) => self.waiting.push_back(event),
            Err(error) => tracing::error!(%error, "an event cannot be written as JSON; this is a bug in Wherry"),
        }
    }
}
