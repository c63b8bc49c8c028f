//! What operators have resolved by hand.

use handfast_proto::{BranchId, Xid};

use super::{
    Connection, Dialect, Query,
    branches::ResolutionOfBranch,
    record::Found,
    sight::{END_READING, SEEN, Sight, XIDS_MAX},
};
use crate::{
    store::{Error, Known},
    transaction::Decision,
};

/// The xid and these columns of what operators have resolved of these transactions. With an empty branch id, the operator has decided
/// the transaction and done no branch's work.
fn select(columns: &str, xids: &[Vec<u8>]) -> Query {
    let mut query = Query::new("SELECT r.xid, ");
    query.push(columns).push(SEEN);
    query.push("LEFT JOIN resolution AS r ON r.branch_id <> '' AND r.xid IN (");
    query.push_list(xids.iter().cloned());
    query
}

/// What operators have resolved of these transactions. They are not joined to the rows of `branch`: such a row may be gone.
pub(super) async fn of_branches<D: Dialect>(
    connection: &mut Connection<D>,
    sight: &mut Sight,
    xids: &[Vec<u8>],
) -> Result<Vec<Found<ResolutionOfBranch>>, Error> {
    let mut query = select("r.branch_id, r.operator, r.reason, r.at", xids);
    sight.push_partition(&mut query);
    // Only frequent sizes are worth keeping prepared.
    query.persistent = [1, XIDS_MAX].contains(&xids.len());
    sight.fetch::<D, _>(connection, query).await
}

pub(in crate::store) async fn resolved<D: Dialect>(
    connection: &mut Connection<D>,
    xid: Xid,
    known: Known,
) -> Result<Vec<(BranchId, Decision)>, Error> {
    D::run(connection, D::BEGIN_READING).await?;
    let mut sight = Sight::of(known);
    let mut query = select("r.branch_id, r.decision", &[xid.to_bytes().to_vec()]);
    sight.push_partition(&mut query);
    let rows: Vec<(Vec<u8>, String, i64)> = sight.fetch::<D, _>(connection, query).await?;
    D::run(connection, END_READING).await?;
    let branch = |(_, branch_id, decision): (_, String, i64)| {
        let damaged = || Error::Corrupt(format!("a resolution of {xid} is damaged"));
        let decision = match decision {
            1 => Decision::Confirm,
            2 => Decision::Cancel,
            _ => return Err(damaged()),
        };
        Ok((branch_id.parse().map_err(|_| damaged())?, decision))
    };
    rows.into_iter().map(branch).collect()
}
