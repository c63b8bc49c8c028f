//! `handfast list`, `show`, `retry`, `resolve`. They call a coordinator over gRPC, and use only AdminService and GetTransaction.

use std::{collections::BTreeMap, time::Duration};

use clap::{Args, ValueEnum};
use handfast_coordinator::{
    clock::{Clock as _, SystemClock},
    transaction::Timestamp,
};
use handfast_proto::{
    BranchId, Xid, connection, limits,
    v1::{
        self as pb, admin_service_client::AdminServiceClient,
        coordinator_service_client::CoordinatorServiceClient, get_transaction_request::By,
        list_transactions_request::Show as Which,
    },
};
use http::{Uri, uri::Scheme};
use jiff::tz::TimeZone;
use tonic::{Response, Status, transport::Channel};

use super::{Failure, json, talk, tell, text};

/// Where `serve` and `dev` listen by default.
pub(super) const SERVER_DEFAULT: &str = "http://127.0.0.1:7420";

/// Lists the newest transactions, newest first.
#[derive(Debug, Args)]
#[command(after_help = "\
With -o json: {\"transactions\": [...], \"more\": false}. Each transaction has the keys of `handfast show -o json`. If more \
is true, there are older ones.

Examples:
  handfast list --stuck -o json | jq -r '.transactions[].xid'
  handfast list --open --name checkout
  handfast list --label order=1042")]
pub(super) struct List {
    /// Only transactions whose phase two keeps failing
    #[arg(long, conflicts_with_all = ["open", "lost"])]
    stuck: bool,
    /// Only transactions that are not finished
    #[arg(long, conflicts_with = "lost")]
    open: bool,
    /// Only undecided transactions whose decision may be among records that the store has lost
    #[arg(long)]
    lost: bool,
    /// Only transactions with this name
    #[arg(long)]
    name: Option<String>,
    /// Only transactions with this label. May be given several times: all must match. Labels and names have no index: the search
    /// reads the recorded transactions, from the newest back, until it has found enough of them
    #[arg(long, value_name = "KEY=VALUE", value_parser = label)]
    label: Vec<(String, String)>,
    /// List at most this many
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1000))]
    limit: u32,
    #[command(flatten)]
    server: Server,
}

/// Prints a transaction: its state, the decision and the reason, and the progress of each branch.
#[derive(Debug, Args)]
#[command(after_help = "\
With -o json: one object. An absent value is null, no key is left out; times are RFC 3339 in UTC:
  xid, name, drive (initiator, coordinator), labels {}, timeout_ms, stuck (true, false)
  state        trying, confirming, cancelling, confirmed, cancelled
  decision     confirm, cancel, null
  begun_at, expires_at, decided_at, finished_at
  cancel       null, or why: {cause, reason, branch_id,
                 refusal {reason, domain, message, metadata {}}}
                 cause: requested, refused, timed_out, try_unknown, coordinator_restarted
  branches     [{branch_id, action, participant, target, address, state, attempts,
                 next_attempt_at, last_error {code, message, at},
                 resolution {operator, reason, at}}]
                 target: as it was registered; address: where it is called
                 state: registered, tried, confirmed, cancelled, resolved

Examples:
  handfast show 3-7-1042-9f3c01d2 -o json | jq -r .state
  handfast show --key order-1042
  handfast show 3-7-1042-9f3c01d2")]
pub(super) struct Show {
    /// The transaction's xid, as `handfast list` prints it
    #[arg(required_unless_present = "key", conflicts_with = "key")]
    xid: Option<Xid>,
    /// The idempotency key that the transaction began with, instead of its xid
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
    #[command(flatten)]
    server: Server,
}

/// Retries every open branch of a transaction now, without waiting for its backoff.
///
/// Changes nothing if the transaction is not decided, or is finished.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  handfast retry 3-7-1042-9f3c01d2")]
pub(super) struct Retry {
    /// The transaction's xid, as `handfast list` prints it
    xid: Xid,
    #[command(flatten)]
    server: Server,
}

/// Settles a branch by hand, if its participant will never answer. Or decides a transaction whose decision is lost.
///
/// With BRANCH: no more calls go to the branch, and it counts as done. Use it when the participant is gone. Correct its data afterwards:
/// until this returns, the next call may still arrive.
///
/// With --decision: decides a transaction of `handfast list --lost`. Before, find out from its participants whether it was confirmed.
/// Then every participant is called, as for any decided transaction.
///
/// Either is recorded for ever, with the operator and the reason, and cannot be undone.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  handfast resolve 3-7-1042-9f3c01d2 --decision confirm --reason \"inventory has confirmed its branch, ticket 815\"
  handfast resolve 3-7-1042-9f3c01d2 2 --reason \"points service retired; 40 points given back by hand, ticket 812\"")]
pub(super) struct Resolve {
    /// The transaction's xid, as `handfast list` prints it
    xid: Xid,
    /// The branch's id, as `handfast show` prints it
    #[arg(
        value_name = "BRANCH",
        required_unless_present = "decision",
        conflicts_with = "decision"
    )]
    branch_id: Option<BranchId>,
    /// Decide the whole transaction, whose own decision may be lost
    #[arg(long, value_enum)]
    decision: Option<Chosen>,
    /// What was done in the participant's place, or why this decision is right
    #[arg(long, value_name = "TEXT")]
    reason: String,
    /// The name of the operator
    #[arg(long, value_name = "NAME", env = "USER", hide_env_values = true)]
    operator: String,
    #[command(flatten)]
    server: Server,
}

/// An operator's decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Chosen {
    /// Its branches are used
    Confirm,
    /// Its branches are released
    Cancel,
}

/// The coordinator to ask, and the form of the output.
#[derive(Debug, Args)]
struct Server {
    /// The address of the coordinator
    #[arg(long = "server", value_name = "URL", env = "HANDFAST_SERVER", hide_env_values = true, default_value = SERVER_DEFAULT, value_parser = server_url)]
    url: String,
    /// How long to wait for the answer
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// Print for people, or for programs
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Table,
    Json,
}

fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("one looks like order=1042")?;
    Ok((key.to_owned(), value.to_owned()))
}

fn server_url(text: &str) -> Result<String, String> {
    let is_plain = |uri: &Uri| {
        uri.scheme() == Some(&Scheme::HTTP)
            && uri.authority().is_some_and(|authority| !authority.as_str().contains('@'))
            && matches!(uri.path(), "" | "/")
            && uri.query().is_none()
    };
    match text.parse::<Uri>() {
        Ok(uri) if is_plain(&uri) => Ok(text.trim_end_matches('/').to_owned()),
        _ => Err(format!("one looks like {SERVER_DEFAULT}")),
    }
}

impl Server {
    /// The flag that a printed command needs to reach the same coordinator.
    fn flag(&self) -> String {
        if self.url == SERVER_DEFAULT { String::new() } else { format!(" --server {}", self.url) }
    }

    /// Connects and asks. `what` names the failure if that does not work.
    async fn ask<T>(
        &self,
        what: &str,
        ask: impl AsyncFnOnce(Channel) -> Result<Response<T>, Status>,
    ) -> Result<T, Failure> {
        let answer = async {
            let uri: Uri =
                self.url.parse().map_err(|error| Failure::unreachable(&self.url, &error))?;
            let channel = connection::endpoint_of(uri)
                .connect()
                .await
                .map_err(|error| Failure::unreachable(&self.url, &error))?;
            let answer = ask(channel).await;
            answer.map_err(|status| Failure::refused(what, &self.url, &status))
        };
        match tokio::time::timeout(self.timeout, answer).await {
            Ok(answer) => Ok(answer?.into_inner()),
            Err(_) => Err(Failure::timed_out(what, &self.url, self.timeout)),
        }
    }

    async fn ask_admin<T>(
        &self,
        what: &str,
        ask: impl AsyncFnOnce(AdminServiceClient<Channel>) -> Result<Response<T>, Status>,
    ) -> Result<T, Failure> {
        let client = |channel| {
            AdminServiceClient::new(channel)
                .max_encoding_message_size(limits::REQUEST_BYTES_MAX)
                .max_decoding_message_size(limits::RESPONSE_BYTES_MAX)
        };
        self.ask(what, async |channel| ask(client(channel)).await).await
    }

    /// Prints a transaction.
    fn tell(
        &self,
        answer: Option<pb::Transaction>,
        for_people: impl FnOnce(&pb::Transaction) -> String,
    ) -> Result<(), Failure> {
        let mut transaction = answer.unwrap_or_default();
        match self.output {
            Output::Table => {
                text::on_one_line(&mut transaction);
                tell(&for_people(&transaction))
            }
            Output::Json => tell(&json::line(&json::Transaction::from(transaction))),
        }
    }
}

impl List {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let show = match (self.stuck, self.open, self.lost) {
            (true, ..) => Which::Stuck,
            (_, true, _) => Which::Open,
            (.., true) => Which::Lost,
            (false, false, false) => Which::All,
        };
        let name = self.name.unwrap_or_default();
        let labels: BTreeMap<String, String> = self.label.into_iter().collect();
        let mut answer = pb::ListTransactionsResponse::default();
        // Large transactions come in several pages.
        loop {
            let listed = u32::try_from(answer.transactions.len()).unwrap_or(u32::MAX);
            let request = pb::ListTransactionsRequest {
                show: show.into(),
                name: name.clone(),
                limit: self.limit.saturating_sub(listed),
                page: answer.next_page,
                labels: labels.clone(),
            };
            let ask = async |mut client: AdminServiceClient<Channel>| {
                client.list_transactions(request).await
            };
            let page = self.server.ask_admin("cannot list transactions", ask).await?;
            (answer.more, answer.next_page) = (page.more, page.next_page);
            answer.transactions.extend(page.transactions);
            if answer.next_page.is_empty() || answer.transactions.len() >= self.limit as usize {
                break;
            }
        }
        if self.server.output == Output::Json {
            return tell(&json::line(&json::Transactions::from(answer)));
        }
        answer.transactions.iter_mut().for_each(text::on_one_line);
        if answer.transactions.is_empty() {
            talk("found no transactions");
        } else {
            tell(&text::list(&answer.transactions, now()))?;
        }
        if answer.more {
            talk(&format!("there are older ones: --limit N, up to {}", limits::LIST_MAX));
        }
        Ok(())
    }
}

impl Show {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let (by, what) = match (self.xid, self.key) {
            (Some(xid), _) => (By::Xid(xid.to_string()), format!("cannot show {xid}")),
            (None, key) => {
                let key = key.unwrap_or_default();
                let what = format!("cannot show the transaction of the key {key:?}");
                (By::IdempotencyKey(key), what)
            }
        };
        let by = Some(by);
        let ask = async |channel| {
            let mut client = CoordinatorServiceClient::new(channel)
                .max_encoding_message_size(limits::REQUEST_BYTES_MAX)
                .max_decoding_message_size(limits::RESPONSE_BYTES_MAX);
            client.get_transaction(pb::GetTransactionRequest { by, ..Default::default() }).await
        };
        let answer = self.server.ask(&what, ask).await?;
        self.server.tell(answer.transaction, |transaction| {
            text::show(transaction, now(), &TimeZone::system(), &self.server.flag())
        })
    }
}

impl Retry {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let request = pb::RetryTransactionRequest { xid: self.xid.to_string() };
        let ask =
            async |mut client: AdminServiceClient<Channel>| client.retry_transaction(request).await;
        let answer = self.server.ask_admin(&format!("cannot retry {}", self.xid), ask).await?;
        self.server
            .tell(answer.transaction, |transaction| text::retried(transaction, &self.server.flag()))
    }
}

impl Resolve {
    pub(super) async fn run(self) -> Result<(), Failure> {
        let Self { xid, branch_id, decision, reason, operator, server } = self;
        let Some(branch_id) = branch_id else {
            let decision = match decision {
                Some(Chosen::Confirm) => pb::Decision::Confirm,
                Some(Chosen::Cancel) => pb::Decision::Cancel,
                None => pb::Decision::Unspecified, // does not happen: one of the two is required
            };
            let request = pb::ResolveTransactionRequest {
                xid: xid.to_string(),
                decision: decision.into(),
                reason,
                operator,
            };
            let ask = async |mut client: AdminServiceClient<Channel>| {
                client.resolve_transaction(request).await
            };
            let answer = server.ask_admin(&format!("cannot decide {xid}"), ask).await?;
            return server.tell(answer.transaction, |transaction| {
                text::decided(transaction, &server.flag())
            });
        };
        let request = pb::ResolveBranchRequest {
            xid: xid.to_string(),
            branch_id: branch_id.to_string(),
            reason,
            operator,
        };
        let ask =
            async |mut client: AdminServiceClient<Channel>| client.resolve_branch(request).await;
        let what = format!("cannot resolve branch {branch_id} of {xid}");
        let answer = server.ask_admin(&what, ask).await?;
        server
            .tell(answer.transaction, |transaction| text::resolved(transaction, branch_id.as_str()))
    }
}

fn now() -> Timestamp {
    SystemClock::default().now()
}

#[cfg(test)]
mod tests {
    use clap::{Parser as _, error::ErrorKind};

    use super::{super::Cli, *};

    fn refused(line: &str) -> (ErrorKind, String) {
        let error = Cli::try_parse_from(line.split(' ')).unwrap_err();
        (error.kind(), error.to_string())
    }

    #[test]
    fn names_are_checked_before_anybody_is_asked() {
        for command in ["show 3-7", "retry 3-7", "resolve 3-7 2 --reason x --operator y"] {
            let (kind, text) = refused(&format!("handfast {command}"));
            assert_eq!(kind, ErrorKind::ValueValidation);
            assert!(
                text.contains(r#""3-7" is no xid: one looks like 3-7-1042-9f3c01d2"#),
                "{text}"
            );
        }
        let (_, text) = refused("handfast resolve 3-7-1042-9f3c01d2 Stock --reason x --operator y");
        assert!(text.contains(r#""Stock" is no branch id"#), "{text}");
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        assert_eq!(refused("handfast list --stuck --open").0, ErrorKind::ArgumentConflict);
        assert_eq!(refused("handfast list --stuck --lost").0, ErrorKind::ArgumentConflict);
        let resolve = "handfast resolve 3-7-1042-9f3c01d2";
        for (given, kind) in [
            ("--reason x --operator y", ErrorKind::MissingRequiredArgument),
            ("2 --decision confirm --reason x --operator y", ErrorKind::ArgumentConflict),
            ("--decision maybe --reason x --operator y", ErrorKind::InvalidValue),
        ] {
            assert_eq!(refused(&format!("{resolve} {given}")).0, kind, "{given}");
        }
        assert_eq!(refused("handfast list --limit 0").0, ErrorKind::ValueValidation);
        assert_eq!(refused("handfast list --limit 1001").0, ErrorKind::ValueValidation);
        assert_eq!(refused("handfast list --timeout 10").0, ErrorKind::ValueValidation);
        assert_eq!(
            refused("handfast resolve 3-7-1042-9f3c01d2 2 --operator y").0,
            ErrorKind::MissingRequiredArgument
        );
    }

    #[test]
    fn a_server_is_a_plain_url() {
        for url in ["http://127.0.0.1:7420", "http://handfast.shop:7420/", "http://[::1]:7420"] {
            assert_eq!(server_url(url).as_deref(), Ok(url.trim_end_matches('/')));
        }
        for url in
            ["", "127.0.0.1:7420", "https://a:1", "http://a:1/b", "http://u:p@a:1", "http://"]
        {
            assert!(server_url(url).unwrap_err().contains(SERVER_DEFAULT), "{url}");
        }
    }

    async fn listed(url: &str, timeout: Duration) -> Failure {
        let server = Server { url: url.to_owned(), timeout, output: Output::Table };
        let list = List {
            stuck: false,
            open: false,
            lost: false,
            name: None,
            label: Vec::new(),
            limit: 1,
            server,
        };
        list.run().await.unwrap_err()
    }

    #[tokio::test]
    async fn nobody_there_is_told_with_the_reason() {
        // Taken and given back: nobody listens there.
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let failure = listed(&format!("http://{address}"), Duration::from_secs(10)).await;
        assert_eq!(failure.code, crate::cli::failure::Code::Unreachable);
        assert_eq!(failure.what, format!("cannot reach the coordinator at http://{address}"));
        assert!(failure.cause.contains("refused"), "{failure}");
    }

    #[tokio::test]
    async fn somebody_who_does_not_answer_is_not_waited_for_longer_than_asked() {
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", silent.local_addr().unwrap());
        let failure = listed(&url, Duration::from_millis(50)).await;
        assert_eq!(failure.code, crate::cli::failure::Code::TimedOut);
        assert_eq!(failure.cause, format!("no answer from {url} within 50ms"));
    }
}
