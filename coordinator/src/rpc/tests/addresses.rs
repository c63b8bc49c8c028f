//! At which address a branch is called.

use super::*;

#[tokio::test]
async fn the_address_that_is_called_is_told_beside_the_one_that_was_registered() {
    let rig = Rig::new().await;
    let at = |id: &str, participant: &str| pb::BranchSpec {
        participant: participant.to_owned(),
        target: "http://127.0.0.1:7001".to_owned(),
        ..spec(id)
    };
    let branches = vec![at("1", "inventory"), at("2", "points")];
    let begun = rig.begin(pb::BeginRequest { branches, ..begin(&[]) }).await.unwrap();
    let transaction = rig.get(&begun.transaction.unwrap().xid).await.unwrap();
    let told = transaction.branches.iter().map(|it| (it.target.as_str(), it.address.as_str()));
    assert_eq!(
        told.collect::<Vec<_>>(),
        [
            ("http://127.0.0.1:7001", "http://10.0.0.1:7001"), // the configuration knows better
            ("http://127.0.0.1:7001", "http://127.0.0.1:7001"),
        ]
    );
}
