//! The store as a file that people copy, move and delete, and the commands for that.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use handfast::Json;
use handfast_tests::{
    database::{Database, servers},
    process::{Coordinator, Signal, handfast},
    warehouse::{Deduct, Warehouse},
};

/// A store in a folder, with a participant.
struct Shop {
    folder: tempfile::TempDir,
    warehouse: Warehouse,
}

impl Shop {
    async fn open() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let warehouse = Warehouse::open("warehouse", folder.path()).await;
        Self { folder, warehouse }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    async fn order(&self, coordinator: &Coordinator) -> String {
        let remote = self.warehouse.remote();
        let order = coordinator.handfast();
        let order = order.transaction("order").run(async |global| {
            global.call::<Deduct>(&remote, Json(1)).await?;
            Ok(())
        });
        order.await.unwrap().xid.to_string()
    }

    /// An order that is left undecided.
    async fn undecided(&self, coordinator: &Coordinator) -> String {
        let hour = Duration::from_secs(3600);
        let order = coordinator.handfast().transaction("order").timeout(hour);
        let open = order.until_decided().begin().await.unwrap();
        open.call::<Deduct>(&self.warehouse.remote(), Json(1)).await.unwrap();
        let xid = open.xid().await.unwrap().to_string();
        std::mem::forget(open); // a drop would cancel it
        xid
    }
}

/// Runs a command. Returns its exit code, and what it says.
async fn run(arguments: &[&str]) -> (i32, String) {
    let output = handfast(arguments).await;
    let said = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8_lossy(&said).into_owned())
}

async fn show(coordinator: &Coordinator, xid: &str) -> String {
    run(&["show", xid, "--server", &coordinator.url()]).await.1
}

fn url(path: &Path) -> String {
    format!("sqlite:{}", path.display())
}

async fn end(mut coordinator: Coordinator) {
    coordinator.signal(Signal::TERM);
    assert!(coordinator.ended().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_the_main_file_is_whole_after_a_stop_and_refused_after_a_kill() {
    let shop = Shop::open().await;
    let (store, copy) = (shop.file("store.db"), shop.file("copy.db"));
    let coordinator = Coordinator::start(&store, &[]).await;
    let xid = shop.order(&coordinator).await;
    end(coordinator).await;
    fs::copy(&store, &copy).unwrap();
    let coordinator = Coordinator::start(&copy, &[]).await;
    assert!(show(&coordinator, &xid).await.contains("CONFIRMED"));
    let newer = shop.order(&coordinator).await;
    coordinator.kill().await;

    let half = shop.file("half.db");
    fs::copy(&copy, &half).unwrap();
    let (code, said) = run(&["serve", "--listen", "127.0.0.1:0", "--store", &url(&half)]).await;
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("not whole") && said.contains("half.db-wal"), "{said}");
    fs::copy(shop.file("copy.db-wal"), shop.file("half.db-wal")).unwrap();
    let coordinator = Coordinator::start(&half, &[]).await;
    // It was killed right after the decision. The last acknowledgement may be missing.
    for _ in 0..300 {
        if show(&coordinator, &newer).await.contains("CONFIRMED") {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{}", show(&coordinator, &newer).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_is_made_while_it_runs_and_what_it_lacks_is_lost_and_not_denied() {
    let shop = Shop::open().await;
    let (store, backup) = (shop.file("store.db"), shop.file("monday.backup"));
    let (at, file) = (url(&store), backup.display().to_string());
    let coordinator = Coordinator::start(&store, &[]).await;
    let early = shop.order(&coordinator).await;
    let undecided = shop.undecided(&coordinator).await;
    let (code, said) = run(&["backup", &file, "--store", &at]).await;
    assert_eq!(code, 0, "{said}");
    let (code, said) = run(&["backup", &file, "--store", &at]).await;
    assert!(code == 1 && said.contains("not overwritten"), "{said}");
    let late = shop.order(&coordinator).await;
    let (code, said) = run(&["restore", &file, "--store", &at]).await;
    assert!(code == 1 && said.contains("in use by another coordinator"), "{said}");
    // The next start is an epoch that the backup does not know of.
    end(coordinator).await;
    let coordinator = Coordinator::start(&store, &[]).await;
    let later = shop.order(&coordinator).await;
    coordinator.kill().await;

    let (code, said) = run(&["serve", "--listen", "127.0.0.1:0", "--store", &url(&backup)]).await;
    assert!(code == 1 && said.contains("handfast restore"), "{said}");
    let (code, said) = run(&["restore", &file, "--store", &at]).await;
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("2 transactions") && said.contains("before-restore"), "{said}");

    let coordinator = Coordinator::start(&store, &[]).await;
    assert!(show(&coordinator, &early).await.contains("CONFIRMED"));
    for lost in [&undecided, &late, &later] {
        let said = show(&coordinator, lost).await;
        assert!(said.contains("lost"), "{lost}: {said}");
    }
    // What was never there is still told from what was lost.
    let new = shop.order(&coordinator).await;
    let (ahead, sequence) =
        new.rsplit_once('-').map(|(head, nonce)| (head.to_owned(), nonce)).unwrap();
    let (place, _) = ahead.rsplit_once('-').unwrap();
    let said = show(&coordinator, &format!("{place}-999999-{sequence}")).await;
    assert!(said.contains("never recorded"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_deleted_or_moved_ends_it_at_once() {
    for moved in [false, true] {
        let shop = Shop::open().await;
        let store = shop.file("store.db");
        let mut coordinator = Coordinator::start(&store, &[]).await;
        shop.order(&coordinator).await;
        if moved {
            fs::rename(&store, shop.file("moved.db")).unwrap();
        } else {
            fs::remove_file(&store).unwrap();
        }
        let since = Instant::now();
        assert_eq!(coordinator.ended().await.code(), Some(11));
        assert!(since.elapsed() < Duration::from_secs(3), "{:?}", since.elapsed());
        let told = coordinator.log().with_message("the store is not where it was; ending at once");
        assert!(told[0]["what"].to_string().contains("deleted or moved"), "{told:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_dump_is_marked() {
    for server in servers() {
        let database = Database::migrated(&server).await;
        let (at, shop) = (database.url(), Shop::open().await);
        let coordinator = Coordinator::start_on(&at, &[]).await;
        let order = shop.order(&coordinator).await;
        let undecided = shop.undecided(&coordinator).await;
        let mark = ["restore", "--mark", "--store", &at];
        let (code, said) = run(&mark).await;
        assert!(code == 1 && said.contains("a coordinator uses this store"), "{said}");
        end(coordinator).await;
        let (code, said) = run(&mark).await;
        assert!(code == 0 && said.contains("16 epochs"), "{said}");
        let coordinator = Coordinator::start_on(&at, &[]).await;
        assert!(show(&coordinator, &order).await.contains("CONFIRMED"));
        assert!(show(&coordinator, &undecided).await.contains("lost"));
        drop(coordinator);
        database.drop().await;
    }
}
