//! Converts requests to our types. All input is checked here, once. Inside the coordinator, a name is never empty, a branch has
//! an address, and every value is within its limits.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use handfast_proto::{BranchId, Xid, limits, text::one_line, time::duration, v1 as pb};
use sha2::{Digest as _, Sha256};

use crate::{
    dispatch::{Targets, kept_refusal},
    partition::{Until, What},
    store::{ListFilter, Listed, Show},
    transaction::{
        BranchSpec, CancelCause, Decision, DecisionRequest, Drive, Key, NewTransaction, Payload,
        Refusal, Timestamp,
    },
};

/// A field of a request is not valid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Invalid {
    /// The field, such as `branches[1].target`.
    pub(super) field: String,
    /// What is wrong, and what would be right.
    pub(super) problem: String,
}

pub(super) fn invalid<T>(
    field: impl Into<String>,
    problem: impl Into<String>,
) -> Result<T, Invalid> {
    Err(Invalid { field: field.into(), problem: problem.into() })
}

pub(super) fn xid(text: &str) -> Result<Xid, Invalid> {
    text.parse().or_else(|error: handfast_proto::id::InvalidXid| invalid("xid", error.to_string()))
}

fn branch_id(field: &str, text: &str) -> Result<BranchId, Invalid> {
    text.parse()
        .or_else(|error: handfast_proto::id::InvalidBranchId| invalid(field, error.to_string()))
}

/// A text of 1 to `bytes_max` bytes without control characters or line breaks.
fn name(field: impl Into<String>, text: String, bytes_max: usize) -> Result<String, Invalid> {
    if text.is_empty() {
        return invalid(field, "must not be empty");
    }
    words(field, text, bytes_max)
}

/// A text of up to `bytes_max` bytes without control characters or line breaks.
fn words(field: impl Into<String>, text: String, bytes_max: usize) -> Result<String, Invalid> {
    if text.len() > bytes_max {
        return invalid(field, format!("has {} bytes, and may have {bytes_max}", text.len()));
    }
    if text.chars().any(char::is_control) {
        return invalid(field, "has a control character (a line break, for example)");
    }
    Ok(text)
}

/// The common part of Begin and Execute: the transaction to begin.
pub(super) struct NewRequest {
    pub(super) name: String,
    pub(super) drive: Drive,
    pub(super) timeout: Option<prost_types::Duration>,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) idempotency_key: String,
    pub(super) fingerprint: Vec<u8>,
    pub(super) branches: Vec<pb::BranchSpec>,
    pub(super) record: i32,
}

impl From<pb::BeginRequest> for NewRequest {
    fn from(request: pb::BeginRequest) -> Self {
        let pb::BeginRequest {
            name,
            timeout,
            labels,
            idempotency_key,
            branches,
            fingerprint,
            record,
        } = request;
        Self {
            name,
            drive: Drive::Initiator,
            timeout,
            labels,
            idempotency_key,
            fingerprint,
            branches,
            record,
        }
    }
}

impl From<pb::ExecuteRequest> for NewRequest {
    fn from(request: pb::ExecuteRequest) -> Self {
        let pb::ExecuteRequest {
            name,
            timeout,
            labels,
            idempotency_key,
            fingerprint,
            branches,
            in_order,
            ..
        } = request;
        Self {
            name,
            drive: Drive::Coordinator { in_order },
            timeout,
            labels,
            idempotency_key,
            fingerprint,
            branches,
            record: pb::Record::AtBegin.into(),
        }
    }
}

pub(super) fn new_transaction(
    request: NewRequest,
    targets: &Targets,
    timeout_default: Duration,
) -> Result<NewTransaction, Invalid> {
    let NewRequest { drive, .. } = request;
    let lasts = match request.timeout {
        None => timeout_default,
        Some(wire) => timeout("timeout", &wire)?,
    };
    if drive != Drive::Initiator && request.branches.is_empty() {
        return invalid("branches", "must not be empty: there is nothing to execute");
    }
    let at_decision = match pb::Record::try_from(request.record) {
        Ok(pb::Record::Unspecified | pb::Record::AtBegin) => false,
        Ok(pb::Record::AtDecision) => true,
        Err(_) => return invalid("record", "is not known here: this coordinator is older"),
    };
    let branches = branches(request.branches, drive, targets)?;
    let name = name("name", request.name, limits::NAME_BYTES_MAX)?;
    let key = match words("idempotency_key", request.idempotency_key, limits::KEY_BYTES_MAX)? {
        key if key.is_empty() && !request.fingerprint.is_empty() => {
            return invalid("fingerprint", "is only for requests with an idempotency_key");
        }
        key if key.is_empty() => None,
        key => {
            let digest = match fingerprint(&request.fingerprint)? {
                Some(digest) => digest,
                None => digest(&name, drive, &branches),
            };
            Some(Key { hash: key_hash(&key), digest })
        }
    };
    let labels = labels(request.labels)?;
    Ok(NewTransaction { labels, name, drive, timeout: lasts, key, branches, at_decision })
}

/// A timeout of phase one, or of a part of it.
fn timeout(field: &str, wire: &prost_types::Duration) -> Result<Duration, Invalid> {
    let (min, max) = (limits::TIMEOUT_MIN, limits::TIMEOUT_MAX);
    match duration(wire).filter(|timeout| (min..=max).contains(timeout)) {
        Some(timeout) => Ok(timeout),
        None => invalid(field, format!("must be from {min:?} to {max:?}")),
    }
}

fn labels(labels: BTreeMap<String, String>) -> Result<BTreeMap<String, String>, Invalid> {
    if labels.len() > limits::LABELS_MAX {
        return invalid(
            "labels",
            format!("there are {}, and may be {}", labels.len(), limits::LABELS_MAX),
        );
    }
    let label = |(key, value): (String, String)| {
        let field = format!("labels[{:?}]", key.chars().take(64).collect::<String>());
        let value = words(&*field, value, limits::LABEL_VALUE_BYTES_MAX)?;
        Ok((name(format!("{field} key"), key, limits::LABEL_KEY_BYTES_MAX)?, value))
    };
    labels.into_iter().map(label).collect()
}

/// Checks each branch, and that they fit together. A repeated branch counts once.
pub(super) fn branches(
    messages: Vec<pb::BranchSpec>,
    drive: Drive,
    targets: &Targets,
) -> Result<Vec<BranchSpec>, Invalid> {
    if messages.len() > limits::BRANCHES_MAX {
        return invalid(
            "branches",
            format!("there are {}, and may be {}", messages.len(), limits::BRANCHES_MAX),
        );
    }
    let mut branches: Vec<BranchSpec> = Vec::with_capacity(messages.len());
    let mut payload_bytes = 0;
    for (index, message) in messages.into_iter().enumerate() {
        let spec = branch(&format!("branches[{index}]"), message, drive, targets)?;
        payload_bytes += spec.payload.as_ref().map_or(0, |payload| payload.data.len());
        match branches.iter().find(|known| known.branch_id == spec.branch_id) {
            None => branches.push(spec),
            Some(known) if known.same_content(&spec) && known.payload == spec.payload => {}
            Some(_) => {
                let problem = format!("{} is there twice, with other content", spec.branch_id);
                return invalid(format!("branches[{index}].branch_id"), problem);
            }
        }
    }
    if payload_bytes > limits::PAYLOADS_BYTES_MAX {
        let problem = format!(
            "their payloads have {payload_bytes} bytes together, and may have {}",
            limits::PAYLOADS_BYTES_MAX
        );
        return invalid("branches", problem);
    }
    Ok(branches)
}

fn branch(
    field: &str,
    message: pb::BranchSpec,
    drive: Drive,
    targets: &Targets,
) -> Result<BranchSpec, Invalid> {
    let pb::BranchSpec {
        branch_id: id,
        action,
        participant,
        target,
        payload,
        carry_payload,
        try_timeout,
        inquires,
    } = message;
    let spec = BranchSpec {
        branch_id: branch_id(&format!("{field}.branch_id"), &id)?,
        action: name(format!("{field}.action"), action, limits::ACTION_BYTES_MAX)?,
        participant: name(
            format!("{field}.participant"),
            participant,
            limits::PARTICIPANT_BYTES_MAX,
        )?,
        target: words(format!("{field}.target"), target, limits::TARGET_BYTES_MAX)?,
        payload: payload
            .map(|message| {
                self::payload(&format!("{field}.payload"), message, limits::PAYLOAD_BYTES_MAX)
            })
            .transpose()?,
        carry_payload,
        try_timeout: try_timeout
            .map(|wire| timeout(&format!("{field}.try_timeout"), &wire))
            .transpose()?,
        inquires,
        damage: None,
    };
    if let Err(unreachable) = targets.addresses(&spec.participant, &spec.target) {
        return invalid(format!("{field}.target"), unreachable.to_string());
    }
    match (drive, carry_payload, &spec.payload) {
        (Drive::Initiator, false, Some(_)) => invalid(
            format!("{field}.payload"),
            "is only for branches that ask the coordinator to carry it (carry_payload); the initiator sends it with its Try",
        ),
        (_, true, None) => {
            invalid(format!("{field}.payload"), "is missing, and carry_payload asks to carry it")
        }
        (Drive::Initiator, false, None)
        | (Drive::Coordinator { .. }, false, _)
        | (_, true, Some(_)) => Ok(spec),
    }
}

fn payload(field: &str, message: pb::Payload, bytes_max: usize) -> Result<Payload, Invalid> {
    if message.data.len() > bytes_max {
        let problem = format!("has {} bytes, and may have {bytes_max}", message.data.len());
        return invalid(format!("{field}.data"), problem);
    }
    let content_type = words(
        format!("{field}.content_type"),
        message.content_type,
        limits::CONTENT_TYPE_BYTES_MAX,
    )?;
    Ok(Payload { data: message.data, content_type })
}

/// SHA-256 of an idempotency key.
pub(super) fn key_hash(key: &str) -> [u8; 32] {
    Sha256::digest(key).into()
}

/// Checks a key to be looked up, and hashes it.
pub(super) fn key(text: String) -> Result<[u8; 32], Invalid> {
    Ok(key_hash(&name("idempotency_key", text, limits::KEY_BYTES_MAX)?))
}

/// The digest for a caller's fingerprint, to be compared when the key comes again. `None` without a fingerprint.
pub(super) fn fingerprint(fingerprint: &[u8]) -> Result<Option<[u8; 32]>, Invalid> {
    let max = limits::FINGERPRINT_BYTES_MAX;
    match fingerprint.len() {
        0 => Ok(None),
        bytes if bytes > max => {
            invalid("fingerprint", format!("has {bytes} bytes, and may have {max}"))
        }
        // The prefix keeps it distinct from a digest of the content.
        _ => Ok(Some(
            Sha256::new().chain_update("fingerprint").chain_update(fingerprint).finalize().into(),
        )),
    }
}

/// SHA-256 of what must be the same when a key comes again. Addresses of participants and timeouts may differ.
fn digest(name: &str, drive: Drive, branches: &[BranchSpec]) -> [u8; 32] {
    let mut hash = Sha256::new();
    // Each part is preceded by its length, so that different contents never give the same bytes.
    let mut part = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_be_bytes());
        hash.update(bytes);
    };
    part(name.as_bytes());
    part(match drive {
        Drive::Initiator => b"initiator",
        Drive::Coordinator { in_order: false } => b"coordinator",
        Drive::Coordinator { in_order: true } => b"coordinator in order",
    });
    for branch in branches {
        part(branch.branch_id.as_str().as_bytes());
        part(branch.action.as_bytes());
        part(branch.participant.as_bytes());
        part(branch.payload.as_ref().map_or(b"", |payload| &payload.data));
    }
    hash.finalize().into()
}

pub(super) fn decide(request: pb::DecideRequest) -> Result<(Xid, What), Invalid> {
    let xid = xid(&request.xid)?;
    let decision = match request.decision() {
        pb::Decision::Unspecified => return invalid("decision", "must be CONFIRM or CANCEL"),
        pb::Decision::Confirm => {
            if request.tried_branch_ids.len() > limits::BRANCHES_MAX {
                return invalid(
                    "tried_branch_ids",
                    format!("may be {} at most", limits::BRANCHES_MAX),
                );
            }
            let tried = request.tried_branch_ids.iter().enumerate();
            let tried: BTreeSet<_> = tried
                .map(|(n, id)| branch_id(&format!("tried_branch_ids[{n}]"), id))
                .collect::<Result<_, _>>()?;
            let result = request.result;
            let result = result.map(|it| payload("result", it, limits::RESULT_BYTES_MAX));
            DecisionRequest::Confirm { tried, result: result.transpose()?.map(Box::new) }
        }
        pb::Decision::Cancel => DecisionRequest::Cancel(match request.refusal {
            None if !request.unknown_branch_id.is_empty() => CancelCause::TryUnknown {
                branch_id: branch_id("unknown_branch_id", &request.unknown_branch_id)?,
                error: reason_of_cancel(&request.reason)?,
            },
            None => CancelCause::Requested { reason: reason_of_cancel(&request.reason)? },
            Some(message) => CancelCause::Refused {
                branch_id: match request.refused_branch_id.as_str() {
                    "" => None,
                    id => Some(branch_id("refused_branch_id", id)?),
                },
                refusal: refusal(message)?,
            },
        }),
    };
    Ok((xid, What::Decide(decision)))
}

/// Made into one line, like a refusal: a line break in an error text must not prevent a Cancel.
fn reason_of_cancel(text: &str) -> Result<String, Invalid> {
    words("reason", one_line(text), limits::REASON_BYTES_MAX)
}

fn refusal(message: pb::Refusal) -> Result<Refusal, Invalid> {
    let pb::Refusal { reason, domain, message, metadata } = message;
    let bytes = reason.len() + domain.len() + message.len();
    let bytes = bytes + metadata.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>();
    if bytes > limits::REFUSAL_BYTES_MAX {
        return invalid(
            "refusal",
            format!("has {bytes} bytes, and may have {}", limits::REFUSAL_BYTES_MAX),
        );
    }
    Ok(kept_refusal(pb::Refusal { reason, domain, message, metadata }))
}

pub(super) fn inquired(
    request: pb::InquireBranchesRequest,
) -> Result<Vec<(Xid, BranchId)>, Invalid> {
    let (branches, max) = (request.branches, limits::INQUIRED_MAX);
    if branches.is_empty() || branches.len() > max {
        let problem = format!("there are {}, and must be 1 to {max}", branches.len());
        return invalid("branches", problem);
    }
    let inquired = |(n, branch): (usize, &pb::InquiredBranch)| {
        let field = format!("branches[{n}]");
        let xid =
            xid(&branch.xid).map_err(|wrong| Invalid { field: format!("{field}.xid"), ..wrong });
        Ok((xid?, branch_id(&format!("{field}.branch_id"), &branch.branch_id)?))
    };
    branches.iter().enumerate().map(inquired).collect()
}

pub(super) fn until(message: pb::Until) -> Until {
    match message {
        pb::Until::Unspecified | pb::Until::Decided => Until::Decided,
        pb::Until::Completed => Until::Completed,
    }
}

/// How long to wait for a transaction to complete.
pub(super) fn wait(message: Option<prost_types::Duration>) -> Result<Duration, Invalid> {
    match message {
        None => Ok(limits::WAIT_DEFAULT),
        Some(wire) => match duration(&wire).filter(|wait| *wait <= limits::WAIT_MAX) {
            Some(wait) => Ok(wait),
            None => invalid("wait", format!("must be up to {:?}", limits::WAIT_MAX)),
        },
    }
}

pub(super) fn resolve_branch(request: pb::ResolveBranchRequest) -> Result<(Xid, What), Invalid> {
    let what = What::Resolve {
        branch_id: branch_id("branch_id", &request.branch_id)?,
        operator: name("operator", request.operator, limits::OPERATOR_BYTES_MAX)?,
        reason: name("reason", request.reason, limits::REASON_BYTES_MAX)?,
    };
    Ok((xid(&request.xid)?, what))
}

pub(super) fn resolve_transaction(
    request: pb::ResolveTransactionRequest,
) -> Result<(Xid, What), Invalid> {
    let decision = match request.decision() {
        pb::Decision::Confirm => Decision::Confirm,
        pb::Decision::Cancel => Decision::Cancel,
        pb::Decision::Unspecified => {
            return invalid("decision", "must be CONFIRM or CANCEL");
        }
    };
    let what = What::ResolveTransaction {
        decision,
        operator: name("operator", request.operator, limits::OPERATOR_BYTES_MAX)?,
        reason: name("reason", request.reason, limits::REASON_BYTES_MAX)?,
    };
    Ok((xid(&request.xid)?, what))
}

/// The filter of a list, and the number of transactions on a page.
pub(super) fn list(
    request: pb::ListTransactionsRequest,
    stuck_now: Show,
) -> Result<(ListFilter, usize), Invalid> {
    let show = match request.show() {
        pb::list_transactions_request::Show::Unspecified
        | pb::list_transactions_request::Show::All => Show::All,
        pb::list_transactions_request::Show::Open => Show::Open,
        pb::list_transactions_request::Show::Stuck => stuck_now,
        pb::list_transactions_request::Show::Lost => Show::Lost,
    };
    let limit = match request.limit as usize {
        0 => limits::LIST_DEFAULT,
        limit if limit <= limits::LIST_MAX => limit,
        limit => return invalid("limit", format!("is {limit}, and may be {}", limits::LIST_MAX)),
    };
    let name = words("name", request.name, limits::NAME_BYTES_MAX)?;
    let labels = labels(request.labels)?;
    let after = match request.page.as_str() {
        "" => None,
        page => Some(listed(page)?),
    };
    let name = Some(name).filter(|name| !name.is_empty());
    Ok((ListFilter { name, labels, after, ..ListFilter::of(show) }, limit))
}

/// Parses a page token of [`super::response::page`].
fn listed(page: &str) -> Result<Listed, Invalid> {
    let parts = page.split_once('/');
    let cursor =
        parts.and_then(|(begun_at, xid)| Some((begun_at.parse().ok()?, xid.parse().ok()?)));
    match cursor {
        Some((begun_at, xid)) => Ok(Listed { begun_at: Timestamp(begun_at), xid }),
        None => invalid("page", "must be next_page of an earlier answer"),
    }
}
