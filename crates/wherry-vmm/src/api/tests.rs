use std::collections::BTreeSet;
use std::sync::Arc;

use serde::Serialize;
use serde_json::{Value, json};
use wherry_migration::progress::{Blackout, Job, Phase, Postcopy, Round, SourceFaults, VcpuFaults};

use super::server::{MAX_BODY, Server, changes, routes};
use super::socket::ApiSocket;
use super::types::*;
use super::{BASE, OPENAPI};
use crate::service::Service;
use crate::service::tests::{Fake, FakeEngine, wait_for};

fn document() -> Value {
    serde_json::from_str(OPENAPI).unwrap()
}

fn resolve<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    match schema.get("$ref").and_then(Value::as_str) {
        Some(reference) => {
            let name = reference.strip_prefix("#/components/schemas/").unwrap();
            document["components"]["schemas"].get(name).unwrap_or_else(|| panic!("no schema {name}"))
        }
        None => schema,
    }
}

/// Holds a value against a schema of the subset of JSON Schema that the document uses.
fn check(document: &Value, schema: &Value, value: &Value, at: &str) {
    let schema = resolve(document, schema);
    if let Some(choices) = schema.get("oneOf").and_then(Value::as_array) {
        let wanted = choices.iter().find(|c| (c["type"] == "null") == value.is_null()).unwrap();
        return check(document, wanted, value, at);
    }
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    let allowed = match &schema["type"] {
        Value::Array(kinds) => kinds.iter().any(|k| k == kind),
        one => one == kind,
    };
    assert!(allowed, "{at}: {value} is not {}", schema["type"]);
    if let Some(words) = schema.get("enum").and_then(Value::as_array) {
        assert!(words.contains(value), "{at}: {value} is not one of {words:?}");
    }
    match value {
        Value::Array(items) => {
            for (i, item) in items.iter().enumerate() {
                check(document, &schema["items"], item, &format!("{at}[{i}]"));
            }
        }
        Value::Object(fields) => {
            let described: BTreeSet<_> = schema["properties"].as_object().unwrap().keys().collect();
            let there: BTreeSet<_> = fields.keys().collect();
            assert_eq!(described, there, "{at}: described on the left, there on the right");
            for (name, field) in fields {
                check(document, &schema["properties"][name], field, &format!("{at}.{name}"));
            }
        }
        _ => {}
    }
}

fn check_type(schema: &str, value: &impl Serialize) {
    let document = document();
    check(&document, &document["components"]["schemas"][schema], &serde_json::to_value(value).unwrap(), schema);
}

#[test]
fn every_type_is_described_field_by_field() {
    let hardware = Hardware {
        blocks: vec![RamBlock { id: 0, guest_base: 0, size: 4096, page_size: 4096, fd: 3 }],
        ..Hardware::default()
    };
    let mut info = VmInfo {
        state: VmState::Running,
        reason: Some("r".into()),
        vm: Some(hardware),
        listen: Some("tcp:h:1".into()),
        pid: 1,
        version: "v".into(),
    };
    check_type("VmInfo", &info);
    info.vm = None;
    check_type("VmInfo", &info);
    let job = Job {
        rounds: vec![Round::default()],
        blackout: Some(Blackout::default()),
        postcopy: Some(Postcopy {
            vcpus: vec![VcpuFaults::default()],
            sources: vec![SourceFaults { quarantined: Some("q".into()), ..SourceFaults::default() }],
            ..Postcopy::default()
        }),
        error: Some("e".into()),
        ..Job::default()
    };
    check_type("Job", &job);
    check_type("Job", &Job::default());
    check_type("Ping", &Ping { program: "p".into(), version: "v".into(), pid: 1 });
    check_type("ErrorBody", &ErrorBody { error: ErrorInfo { code: ErrorCode::Failed, message: "m".into() } });
    check_type(
        "PhaseEvent",
        &PhaseEvent { state: VmState::Moved, phase: Phase::Done, attempt: "a".into(), reason: None },
    );
    let request: MigrationRequest = serde_json::from_value(json!({"to": "tcp:h:1"})).unwrap();
    check_type("MigrationRequest", &request);
    check_type("ResolveRequest", &ResolveRequest { side: wherry_migration::Side::Source });
    check_type("RecoverRequest", &RecoverRequest { to: Some("tcp:h:1".into()), listen: Some("unix:/s".into()) });
    check_type("BalloonRequest", &BalloonRequest { size: 1 << 30 });
    check_type("BalloonInfo", &BalloonInfo::default());
    let told = GuestStatistics { free: Some(1), total: Some(2), ..GuestStatistics::default() };
    check_type("GuestStatistics", &told);
    check_type("StopRequest", &StopRequest { force: true });
    let device = DeviceInfo {
        number: 1,
        name: "vfio-user0".into(),
        kind: "vfio-user".into(),
        address: "00:01.0".into(),
        connected_to: "/s".into(),
        state: DeviceState::Present,
        removable: true,
    };
    check_type("DeviceInfo", &device);
    check_type("DeviceEvent", &DeviceEvent { change: DeviceChange::Added, device });
    check_type("UpdateRequest", &UpdateRequest { binary: Some("/b".into()), mode: UpdateMode::Exec });
    check_type("UpdateInfo", &UpdateInfo { pid: 1, job: Job::default() });
    check_type("DeviceAddRequest", &DeviceAddRequest { device: "vfio-user=/s".into() });
    check_type("DeviceRemoveRequest", &DeviceRemoveRequest { name: "vfio-user0".into(), timeout_s: Some(1) });
}

#[test]
fn what_becomes_of_devices_is_told_and_another_device_of_the_same_name_is_another() {
    let device = |number, state| DeviceInfo {
        number,
        name: "vfio-user0".into(),
        kind: "vfio-user".into(),
        address: "00:01.0".into(),
        connected_to: "/s".into(),
        state,
        removable: true,
    };
    let told = |before: &[DeviceInfo], now: &[DeviceInfo]| -> Vec<(DeviceChange, u64)> {
        changes(before, now).into_iter().map(|(change, device)| (change, device.number)).collect()
    };
    let (present, asked) = (device(1, DeviceState::Present), device(1, DeviceState::Unplugging));
    let (ejected, next) = (device(1, DeviceState::Ejected), device(2, DeviceState::Present));
    let one = std::slice::from_ref;
    assert_eq!(told(&[], one(&present)), [(DeviceChange::Added, 1)]);
    assert_eq!(told(one(&present), one(&present)), []);
    assert_eq!(told(one(&present), one(&asked)), [(DeviceChange::Unplugging, 1)]);
    assert_eq!(told(one(&asked), one(&present)), [(DeviceChange::Stays, 1)]);
    assert_eq!(told(one(&asked), one(&ejected)), [(DeviceChange::Ejected, 1)]);
    assert_eq!(told(one(&ejected), one(&next)), [(DeviceChange::Removed, 1), (DeviceChange::Added, 2)]);
    assert_eq!(told(one(&next), &[]), [(DeviceChange::Removed, 2)]);
}

#[test]
fn every_word_of_an_enumeration_is_described_and_no_other() {
    let words = |schema: &str| -> BTreeSet<String> {
        serde_json::from_value(document()["components"]["schemas"][schema]["enum"].clone()).unwrap()
    };
    fn known<T: serde::de::DeserializeOwned>(words: &BTreeSet<String>) {
        for word in words {
            serde_json::from_value::<T>(json!(word)).unwrap_or_else(|e| panic!("{word}: {e}"));
        }
    }
    /// The words serde lists when it meets one that it does not know.
    fn listed<T: serde::de::DeserializeOwned + std::fmt::Debug>() -> BTreeSet<String> {
        let error = serde_json::from_value::<T>(json!("no such word")).unwrap_err().to_string();
        let list = error.split("expected").nth(1).unwrap_or_default();
        list.split('`').skip(1).step_by(2).map(String::from).collect()
    }
    known::<VmState>(&words("VmState"));
    assert_eq!(listed::<VmState>(), words("VmState"));
    assert_eq!(listed::<Phase>(), words("Phase"));
    assert_eq!(listed::<Mode>(), words("Mode"));
    assert_eq!(listed::<wherry_migration::Side>(), words("Side"));
    assert_eq!(listed::<ErrorCode>(), words("ErrorCode"));
    assert_eq!(listed::<DeviceState>(), words("DeviceState"));
    assert_eq!(listed::<DeviceChange>(), words("DeviceChange"));
}

#[test]
fn every_route_is_described_and_every_description_has_a_route() {
    let served: BTreeSet<_> = routes().iter().map(|(method, path, _)| format!("{method} {BASE}{path}")).collect();
    let mut described = BTreeSet::new();
    for (path, methods) in document()["paths"].as_object().unwrap() {
        described.extend(methods.as_object().unwrap().keys().map(|method| format!("{method} {path}")));
    }
    assert_eq!(served, described);
}

#[test]
fn every_reference_of_the_description_leads_somewhere() {
    fn walk(document: &Value, value: &Value) {
        match value {
            Value::Object(fields) => {
                if fields.contains_key("$ref") {
                    resolve(document, value);
                }
                fields.values().for_each(|v| walk(document, v));
            }
            Value::Array(items) => items.iter().for_each(|v| walk(document, v)),
            _ => {}
        }
    }
    walk(&document(), &document());
}

// ---- over a real socket ----

struct Api {
    _server: Server,
    socket: ApiSocket,
    _dir: tempfile::TempDir,
}

impl Api {
    fn serve(service: &Arc<Service>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = ApiSocket::bind(&dir.path().join("api")).unwrap();
        let server = Server::start(socket.listener().unwrap(), service.clone()).unwrap();
        Self { _server: server, socket, _dir: dir }
    }

    /// Sends a request as written and gives status and body.
    fn raw(&self, request: &[u8]) -> (u16, Value) {
        use std::io::{Read, Write};
        let mut stream = std::os::unix::net::UnixStream::connect(self.socket.path()).unwrap();
        stream.set_read_timeout(Some(std::time::Duration::from_secs(30))).unwrap();
        // A server that refuses early may close before it has read everything.
        let _ = stream.write_all(request);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer);
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no HTTP answer: {answer:?}"));
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, serde_json::from_str(body).unwrap_or_else(|e| panic!("{e}: {body:?}")))
    }

    fn call(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        let length = body.len();
        let request = format!(
            "{method} {BASE}{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        self.raw(request.as_bytes())
    }

    fn error(&self, method: &str, path: &str, body: &str) -> (u16, String, String) {
        let (status, value) = self.call(method, path, body);
        let body: ErrorBody = serde_json::from_value(value.clone()).unwrap_or_else(|e| panic!("{e}: {value}"));
        let code = serde_json::to_value(body.error.code).unwrap().as_str().unwrap().to_owned();
        (status, code, body.error.message)
    }
}

#[test]
fn a_vm_is_paused_resumed_and_stopped_over_the_socket() {
    let service = Service::new(Arc::new(FakeEngine::default()), Default::default());
    let api = Api::serve(&service);
    service.start(Fake::boxed(), false).unwrap();
    assert_eq!(api.call("GET", "/ping", "").1["program"], "wherry");
    assert_eq!(api.call("GET", "/vm", "").1["state"], "running");
    assert_eq!(api.call("PUT", "/vm/pause", "").1["state"], "paused");
    assert_eq!(api.call("PUT", "/vm/pause", "{}").0, 200);
    assert_eq!(api.call("PUT", "/vm/resume", "").1["state"], "running");
    assert_eq!(api.call("GET", "/migration", "").1["phase"], "none");
    assert_eq!(api.call("PUT", "/vm/stop", "").1["state"], "stopped");
    assert_eq!(service.wait_for_end().status, 0);
}

#[test]
fn bad_requests_are_told_apart_and_say_what_is_wrong() {
    let service = Service::new(Arc::new(FakeEngine::default()), Default::default());
    let api = Api::serve(&service);
    service.start(Fake::boxed(), false).unwrap();

    let (status, code, message) = api.error("PUT", "/migration", "{\"to\":");
    assert_eq!((status, code.as_str()), (400, "bad-request"), "{message}");
    let (status, _, message) = api.error("PUT", "/migration", r#"{"to":"tcp:h:1","downtime":5}"#);
    assert!(status == 400 && message.contains("unknown field `downtime`"), "{message}");
    let (status, _, message) = api.error("PUT", "/migration", r#"{"to":"tcp:h:1","mode":"teleport"}"#);
    assert!(status == 400 && message.contains("teleport"), "{message}");
    let (status, _, message) = api.error("PUT", "/migration", "");
    assert!(status == 400 && message.contains("body"), "{message}");
    let (status, _, message) = api.error("PUT", "/vm/pause", r#"{"now":true}"#);
    assert!(status == 400 && message.contains("takes no body"), "{message}");
    let (status, code, message) = api.error("GET", "/nothing", "");
    assert!(status == 404 && code == "not-found" && message.contains("/nothing"), "{message}");
    let (status, code, message) = api.error("DELETE", "/vm", "");
    assert!(status == 405 && code == "method-not-allowed" && message.contains("DELETE"), "{message}");
    let (status, code, _) = api.error("PUT", "/migration", &"x".repeat(MAX_BODY + 1));
    assert_eq!((status, code.as_str()), (413, "too-large"));
    let request =
        format!("PUT {BASE}/migration HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n");
    let chunk = format!("{:x}\r\n{}\r\n", 60_000, "y".repeat(60_000));
    let (status, value) = api.raw(format!("{request}{chunk}{chunk}0\r\n\r\n").as_bytes());
    assert_eq!((status, value["error"]["code"].as_str()), (413, Some("too-large")));
    assert_eq!(api.call("GET", "/vm", "").1["state"], "running", "nothing of this has touched the VM");
}

#[test]
fn a_balloon_is_asked_for_its_size_and_given_another() {
    let service = Service::new(Arc::new(FakeEngine::default()), Default::default());
    let api = Api::serve(&service);
    assert_eq!(api.error("GET", "/balloon", "").0, 409, "there is no VM yet");
    service.start(Fake::boxed(), false).unwrap();
    let (status, balloon) = api.call("GET", "/balloon", "");
    assert_eq!((status, &balloon["size"]), (200, &json!(1 << 30)));
    let (status, balloon) = api.call("PUT", "/balloon", r#"{"size":536870912}"#);
    assert_eq!((status, &balloon["size"], &balloon["actual"]), (200, &json!(512 << 20), &json!(1 << 30)));
    assert_eq!(api.error("PUT", "/balloon", r#"{"size":4294967296}"#).1, "bad-request");
    for wrong in ["", "{}", r#"{"size":-1}"#, r#"{"size":1,"unit":"G"}"#] {
        assert_eq!(api.error("PUT", "/balloon", wrong).0, 400, "{wrong}");
    }
}

#[test]
fn a_device_is_plugged_listed_and_unplugged() {
    let service = Service::new(Arc::new(FakeEngine::default()), Default::default());
    let api = Api::serve(&service);
    assert_eq!(api.call("GET", "/devices", ""), (200, json!([])), "there is no VM yet");
    let (status, code, _) = api.error("PUT", "/devices/add", r#"{"device":"a"}"#);
    assert_eq!((status, code.as_str()), (409, "wrong-state"));
    service.start(Fake::boxed(), false).unwrap();
    let (status, device) = api.call("PUT", "/devices/add", r#"{"device":"a"}"#);
    assert_eq!((status, &device["name"], &device["state"]), (200, &json!("a"), &json!("present")));
    assert_eq!(api.call("GET", "/devices", "").1, json!([device]));
    let (status, code, message) = api.error("PUT", "/devices/remove", r#"{"name":"b"}"#);
    assert_eq!((status, code.as_str()), (404, "not-found"), "{message}");
    for wrong in
        ["", "{}", r#"{"name":"a","timeout_s":0}"#, r#"{"name":"a","timeout_s":601}"#, r#"{"name":"a","by":1}"#]
    {
        assert_eq!(api.error("PUT", "/devices/remove", wrong).0, 400, "{wrong}");
    }
    assert_eq!(api.call("PUT", "/devices/remove", r#"{"name":"a","timeout_s":600}"#).1["name"], "a");
    assert_eq!(api.call("GET", "/devices", "").1, json!([]));
}

#[test]
fn a_second_migration_is_refused_while_the_first_is_under_way() {
    let engine = Arc::new(FakeEngine::default());
    let service = Service::new(engine.clone(), Default::default());
    let api = Api::serve(&service);
    service.start(Fake::boxed(), false).unwrap();
    assert_eq!(api.call("PUT", "/migration", r#"{"to":"tcp:h:1"}"#).0, 202);
    wait_for("the journey to begin", || engine.phase() == Phase::Precopy);
    let (status, code, message) = api.error("PUT", "/migration", r#"{"to":"tcp:h:2"}"#);
    assert!(status == 409 && code == "wrong-state" && message.contains("tcp:h:1"), "{message}");
    let (status, _, message) = api.error("PUT", "/vm/pause", "");
    assert!(status == 409 && message.contains("migrating"), "{message}");
    assert_eq!(api.call("PUT", "/migration/cancel", "").0, 202);
    wait_for("the VM to be back", || api.call("GET", "/vm", "").1["state"] == "running");
    assert_eq!(api.call("GET", "/migration", "").1["phase"], "cancelled");
    assert_eq!(api.error("PUT", "/migration/cancel", "").0, 409);
    assert_eq!(api.error("PUT", "/migration/resolve", r#"{"as":"source"}"#).0, 409);
}

#[test]
fn the_event_stream_tells_states_rounds_and_the_end() {
    use std::io::{BufRead, BufReader, Write};
    let engine = Arc::new(FakeEngine::default());
    let service = Service::new(engine.clone(), Default::default());
    let api = Api::serve(&service);
    service.start(Fake::boxed(), false).unwrap();
    let mut stream = std::os::unix::net::UnixStream::connect(api.socket.path()).unwrap();
    stream.set_read_timeout(Some(std::time::Duration::from_secs(30))).unwrap();
    write!(stream, "GET {BASE}/events HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut lines = BufReader::new(stream).lines().map(|l| l.unwrap());
    let mut next = |wanted: &str| -> Value {
        loop {
            let line = lines.next().unwrap_or_else(|| panic!("the stream ended before {wanted}"));
            if line == format!("event: {wanted}") {
                let data = lines.next().unwrap();
                return serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
            }
        }
    };
    assert_eq!(next("phase")["state"], "running");
    service.migrate(&serde_json::from_value(json!({"to": "tcp:h:1"})).unwrap()).unwrap();
    assert_eq!(next("phase")["phase"], "setup", "a phase that is over before anybody looks is told");
    let phase = next("phase");
    assert_eq!((&phase["state"], &phase["phase"]), (&json!("migrating"), &json!("precopy")));
    engine.set(|job| job.rounds.push(Round { number: 1, pages: 7, ..Round::default() }));
    let round: Round = serde_json::from_value(next("round")).unwrap();
    assert_eq!((round.number, round.pages), (1, 7));
    engine.finish(Phase::Done);
    loop {
        let phase = next("phase");
        if phase["phase"] == "done" && phase["state"] == "moved" {
            break;
        }
    }
    assert_eq!(service.wait_for_end().status, 0);
}
