//! The store's password must never appear in a log, an error or an answer, whatever fails and at any log level.

use std::{fs::File, path::Path, process::Stdio};

use handfast_tests::{
    PATIENCE,
    database::{Database, servers},
    process::{Coordinator, Signal, binary},
};
use tokio::process::Command;

/// A part of all passwords here. It is the same in every encoding of the password, and appears nowhere else.
const SECRET: &str = "zq7X";
const PASSWORD: &str = "zq7X/p@s:s#w%r d";
const ENCODED: &str = "zq7X%2Fp%40s%3As%23w%25r%20d";

/// Runs `handfast` with the store given by flag, by environment variable and by file. Checks all output for the password.
async fn keeps_it(arguments: &[&str], store: &str, folder: &Path) {
    let file = folder.join("handfast.toml");
    std::fs::write(&file, format!("store = {store:?}\nlisten = \"127.0.0.1:0\"\n")).unwrap();
    let file = format!("--config={}", file.display());
    let flag = format!("--store={store}");
    let takes_file = arguments[0] == "serve";
    let ways: [(Option<&str>, Option<&str>); 3] =
        [(Some(&flag), None), (None, Some(store)), (takes_file.then_some(&*file), None)];
    for (argument, variable) in ways.into_iter().filter(|way| *way != (None, None)) {
        let mut command = Command::new(binary("handfast"));
        command.args(arguments).args(argument).stdin(Stdio::null()).kill_on_drop(true);
        if let Some(store) = variable {
            command.env("HANDFAST_STORE", store);
        }
        let output = tokio::time::timeout(PATIENCE, command.output()).await.expect("it ends");
        let output = output.unwrap();
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert!(!said.contains(SECRET), "{arguments:?} {argument:?} {variable:?}: {said}");
    }
}

const SERVE: &[&str] = &["serve", "--log=trace", "--log-format=json", "--listen=127.0.0.1:0"];
const TALK: [&[&str]; 4] = [
    &["serve", "--check"],
    &["serve", "--help"],
    &["migrate", "--help"],
    &["migrate", "--dry-run"],
];

#[tokio::test]
async fn a_url_that_is_wrong_is_told_without_its_password() {
    let folder = tempfile::tempdir().unwrap();
    for wrong in [
        format!("postgres://ann:{ENCODED}@127.0.0.1:1/handfast"),
        format!("mysql://ann:{ENCODED}@127.0.0.1:none/handfast"),
        format!("mysql://ann:{ENCODED}@127.0.0.1:1"),
        format!("mysql:ann:{ENCODED}@127.0.0.1/handfast"),
        format!("mysql://ann:{ENCODED}%@127.0.0.1:1/handfast?ssl-mode=none"),
        format!("sqlite://ann:{ENCODED}@127.0.0.1/handfast"),
        format!("ann:{ENCODED}@127.0.0.1/handfast"),
        format!("mysql://ann:{PASSWORD}@127.0.0.1:1/handfast"),
        // Nothing listens on this port.
        format!("mysql://ann:{ENCODED}@127.0.0.1:1/handfast"),
    ] {
        for arguments in [SERVE, &["migrate"]].into_iter().chain(TALK) {
            keeps_it(arguments, &wrong, folder.path()).await;
        }
    }
}

#[tokio::test]
async fn a_password_is_in_no_log() {
    let folder = tempfile::tempdir().unwrap();
    for server in servers() {
        let database = Database::empty(&server).await;
        let name = database.url().rsplit_once('/').unwrap().1.to_owned();
        let user = format!("ann_{:08x}", rand::random::<u32>());
        for sql in [
            format!("CREATE USER {user} IDENTIFIED BY '{PASSWORD}'"),
            format!("GRANT ALL ON {name}.* TO {user}"),
        ] {
            database.execute(&sql).await;
        }
        let url = |password: &str| database.url().replace("root@", &format!("{user}:{password}@"));
        let right = url(ENCODED);
        for arguments in [&["migrate", "--dry-run"][..], &["migrate"]].into_iter().chain(TALK) {
            keeps_it(arguments, &right, folder.path()).await;
        }
        let tables =
            "SELECT COUNT(*) FROM information_schema.tables WHERE table_schema = DATABASE()";
        assert!(database.number(tables).await > 0, "it has not let us in");
        for arguments in [SERVE, &["migrate"]] {
            keeps_it(arguments, &url("zq7X-is-it-not"), folder.path()).await;
            keeps_it(arguments, &right.replace(&name, "of_somebody_else"), folder.path()).await;
        }

        let talk = folder.path().join("stderr");
        let mut command = Coordinator::command(&right, &["--log=trace"]);
        command.stderr(File::create(&talk).unwrap());
        let mut coordinator = Coordinator::spawn(command).await;
        let begun = coordinator.handfast().transaction("order").begin().await.unwrap();
        begun.xid().await.unwrap();
        coordinator.signal(Signal::TERM);
        assert!(coordinator.ended().await.success());
        let said =
            format!("{:?}", coordinator.log().lines()) + &std::fs::read_to_string(talk).unwrap();
        assert!(said.contains("TRACE"), "nothing is logged");
        assert!(!said.contains(SECRET), "{said}");
        database.execute(&format!("DROP USER {user}")).await;
        database.drop().await;
    }
}
