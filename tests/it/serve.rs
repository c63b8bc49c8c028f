//! The coordinator's process: how it starts, what it logs, how it stops, and what it refuses before it opens a port.

use std::{
    io::{BufRead as _, BufReader},
    process::Stdio,
    time::{Duration, Instant},
};

use handfast_tests::{
    process::{Coordinator, Signal, binary, handfast},
    wait_for,
    warehouse::{Deduct, Warehouse},
};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

async fn health(coordinator: &Coordinator, service: &str) -> ServingStatus {
    let mut client = HealthClient::new(coordinator.channel());
    let request = HealthCheckRequest { service: service.to_owned() };
    client.check(request).await.unwrap().into_inner().status()
}

#[tokio::test]
async fn it_says_that_it_serves_and_what() {
    let folder = tempfile::tempdir().unwrap();
    let coordinator = Coordinator::start(&folder.path().join("store.db"), &[]).await;
    for service in ["", "handfast.v1.CoordinatorService", "handfast.v1.AdminService"] {
        let serving = wait_for("health", async || {
            Some(health(&coordinator, service).await)
                .filter(|status| *status == ServingStatus::Serving)
        });
        serving.await;
    }
    assert_eq!(health(&coordinator, "liveness").await, ServingStatus::Serving);
    // Server reflection works in both versions.
    use tonic_reflection::pb::{v1, v1alpha};
    let names = |list: Option<v1::server_reflection_response::MessageResponse>| {
        let Some(v1::server_reflection_response::MessageResponse::ListServicesResponse(list)) =
            list
        else {
            panic!("no list: {list:?}");
        };
        list.service.into_iter().map(|service| service.name).collect::<Vec<_>>()
    };
    let list = v1::server_reflection_request::MessageRequest::ListServices(String::new());
    let request = v1::ServerReflectionRequest { host: String::new(), message_request: Some(list) };
    let mut client =
        v1::server_reflection_client::ServerReflectionClient::new(coordinator.channel());
    let mut answers =
        client.server_reflection_info(tokio_stream::iter([request])).await.unwrap().into_inner();
    let services = names(answers.message().await.unwrap().unwrap().message_response);
    assert!(services.contains(&"handfast.v1.CoordinatorService".to_owned()), "{services:?}");
    let list = v1alpha::server_reflection_request::MessageRequest::ListServices(String::new());
    let request =
        v1alpha::ServerReflectionRequest { host: String::new(), message_request: Some(list) };
    let mut client =
        v1alpha::server_reflection_client::ServerReflectionClient::new(coordinator.channel());
    let mut answers =
        client.server_reflection_info(tokio_stream::iter([request])).await.unwrap().into_inner();
    assert!(answers.message().await.unwrap().unwrap().message_response.is_some());
}

#[tokio::test]
async fn sigterm_drains_and_exits_with_0_also_when_somebody_keeps_a_stream_open() {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("store.db");
    let warehouse = Warehouse::open("warehouse", folder.path()).await;
    let mut coordinator = Coordinator::start(&store, &["--shutdown-grace", "3s"]).await;
    let mut watch = HealthClient::new(coordinator.channel());
    let mut watch = watch.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    watch.message().await.unwrap();

    let (handfast, remote) = (coordinator.handfast(), warehouse.remote());
    let open = handfast.transaction("order").begin().await.unwrap();
    open.call::<Deduct>(&remote, handfast::Json(3)).await.unwrap();
    let done = open.confirm().await.unwrap();
    assert!(done.completed);

    let began = Instant::now();
    coordinator.signal(Signal::TERM);
    // Health watchers are told before the process ends.
    let not_serving = wait_for("not serving", async || match watch.message().await {
        Ok(Some(status)) => {
            Some(status.status()).filter(|status| *status == ServingStatus::NotServing)
        }
        other => panic!("the stream ended first: {other:?}"),
    });
    not_serving.await;
    assert!(coordinator.ended().await.success());
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    let log = coordinator.log();
    wait_for("its last words", async || log.with_message("stopped").pop()).await;
    // The completion was waiting for a batch. Shutdown has written it, so the next coordinator repeats no calls.
    let next = Coordinator::start(&store, &[]).await;
    let outcome = next.handfast().outcome(done.xid).await.unwrap();
    assert!(format!("{outcome:?}").contains("completed: true"), "{outcome:?}");
}

#[tokio::test]
async fn one_store_has_one_coordinator() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    let store = format!("sqlite:{}", path.display());
    let first = Coordinator::start(&path, &[]).await;
    let second =
        handfast(&["serve", "--store", &store, "--listen", "127.0.0.1:0", "--log-format", "text"])
            .await;
    let words = String::from_utf8_lossy(&second.stderr).into_owned();
    assert_eq!(second.status.code(), Some(1), "{words}");
    assert!(words.contains(&format!("process {}", first.pid())), "{words}");
    // A killed coordinator leaves no lock behind.
    first.kill().await;
    Coordinator::start(&path, &[]).await;
}

#[tokio::test]
async fn what_is_wrong_is_said_before_a_port_is_opened() {
    let folder = tempfile::tempdir().unwrap();
    let store = format!("sqlite:{}", folder.path().join("store.db").display());
    let file = folder.path().join("handfast.toml");
    std::fs::write(&file, "listen = \"127.0.0.1:0\"\n\nlisen = \"127.0.0.1:0\"\n").unwrap();
    for (flags, says) in [
        (
            &["--config", file.to_str().unwrap()][..],
            &["handfast.toml:3", "lisen", "did you mean `listen`"][..],
        ),
        (&["--listen", "127.0.0.1"], &["--listen", "127.0.0.1"]),
        (&["--listen", "0.0.0.0:0"], &["insecure"]),
        (&["--shutdown-grace", "soon"], &["--shutdown-grace", "soon"]),
        (&["--log-format", "xml"], &["--log-format", "xml"]),
        (&["--store", "memory:"], &["memory:"]),
        (&["--lisen", "127.0.0.1:0"], &["--lisen", "--listen"]),
    ] {
        let mut arguments = vec!["serve"];
        if !flags.contains(&"--store") {
            arguments.extend(["--store", &store]);
        }
        arguments.extend(flags);
        let refused = handfast(&arguments).await;
        let words = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(2), "{flags:?}: {words}");
        for word in says {
            assert!(words.contains(word), "{flags:?} does not say {word}: {words}");
        }
        assert!(!folder.path().join("store.db").exists(), "{flags:?} has made a store");
    }
}

#[tokio::test]
async fn a_store_that_cannot_be_used_is_refused_with_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("notes.txt");
    std::fs::write(&text, "Dear diary, ".repeat(100)).unwrap();
    let store = format!("sqlite:{}", text.display());
    let refused = handfast(&["serve", "--store", &store, "--listen", "127.0.0.1:0"]).await;
    let words = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{words}");
    assert!(words.contains("not a store of Handfast"), "{words}");
}

#[tokio::test]
async fn dev_needs_nothing_and_says_what_to_do_next() {
    let mut dev = std::process::Command::new(binary("handfast"))
        .args(["dev", "--listen", "127.0.0.1:0"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stderr = BufReader::new(dev.stderr.take().unwrap());
    let banner: Vec<_> =
        stderr.lines().map_while(Result::ok).take_while(|line| !line.contains("Ctrl-C")).collect();
    dev.kill().unwrap();
    dev.wait().unwrap();
    let banner = banner.join("\n");
    for word in ["http://127.0.0.1:", "handfast list", "README.md"] {
        assert!(banner.contains(word), "the banner does not say {word}:\n{banner}");
    }
}
