//! Runs the scripts in `stories/`: commands above the line, their results below it. To add a story, write its commands, run
//! `UPDATE_GOLDENFILES=1 cargo test -p handfast-coordinator stories`, and read the results.
//!
//! | Command | Meaning |
//! |---|---|
//! | `begin [branch…] [timeout=30s] [drive=initiator\|execute\|execute_in_order]` | one transaction, at time 0 |
//! | `register branch…` | more branches |
//! | `confirm branch…` | the initiator asks for Confirm and names the branches that it has tried |
//! | `cancel [reason]` | the initiator asks for Cancel |
//! | `at 5s` | time passes |
//! | `reply branch done\|refused\|unknown\|timeout\|hopeless [retry_in=1s]` | a call returns |
//! | `hold` | from now on the store does not answer, and nothing becomes durable |
//! | `release` | the store answers again |
//! | `crash` | memory is lost; a new owner loads the durable state |
//! | `retry` | an operator asks for the next attempts at once |
//! | `resolve branch` | an operator settles a branch by hand |
//! | `show` | prints the transaction |

use std::{error::Error, fmt::Write as _, path::Path, time::Duration};

use goldenscript::{ArgumentConsumer, Command, Context, Runner};

use super::*;

#[derive(Default)]
struct Story {
    global: Option<GlobalTransaction>,
    /// The durable state.
    stored: Option<GlobalTransaction>,
    held: bool,
    now_ms: i64,
}

impl Story {
    fn now(&self) -> Timestamp {
        Timestamp(self.now_ms)
    }

    /// Applies an event and prints the change.
    fn apply(&mut self, event: Event) -> String {
        let now = self.now();
        let global = self.global.as_mut().expect("begin first");
        let before = global.clone();
        let mut told = String::new();
        match global.apply(event, now) {
            Err(Rejection::BranchesDiffer { not_named, not_registered }) => {
                writeln!(
                    told,
                    "rejected: not named {not_named:?}, not registered {not_registered:?}"
                )
                .unwrap();
            }
            Err(rejection) => writeln!(told, "rejected: {rejection}").unwrap(),
            Ok(_) => {
                for branch in &global.branches[before.branches.len()..] {
                    writeln!(told, "branch {} registered", branch.spec.branch_id).unwrap();
                }
                for (was, is) in before.branches.iter().zip(&global.branches) {
                    let id = &is.spec.branch_id;
                    if was.state != is.state {
                        writeln!(told, "branch {id} {}", branch_word(&is.state)).unwrap();
                    } else if let (Some(error), Call::Idle { due_at }) = (&is.last_error, is.call)
                        && was.last_error != is.last_error
                    {
                        let attention =
                            if is.needs_attention { ", a person should look" } else { "" };
                        writeln!(
                            told,
                            "branch {id} {}, again in {:?}{attention}",
                            error.code,
                            due_at - now
                        )
                        .unwrap();
                    }
                }
                if before.state != global.state {
                    write!(told, "{} ⇨ {}", word(before.state), word(global.state)).unwrap();
                    if before.cancel != global.cancel {
                        write!(told, " ({})", cause_word(global.cancel.as_ref())).unwrap();
                    }
                    writeln!(told).unwrap();
                }
                if told.is_empty() && before == *global {
                    writeln!(told, "nothing changes").unwrap();
                }
            }
        }
        told + &self.settle()
    }

    /// The store records the changes. Then the calls that are due and durable leave.
    fn settle(&mut self) -> String {
        let now = self.now();
        let global = self.global.as_mut().expect("begin first");
        if !self.held {
            self.stored = Some(global.recorded());
        }
        let durable = self.stored.as_ref();
        if durable.map(|stored| (stored.state.decision(), stored.branches.len()))
            != Some((global.state.decision(), global.branches.len()))
        {
            return "(not durable: nobody hears of it, no call leaves)\n".to_owned();
        }
        let mut told = String::new();
        for call in global.plan(now).calls {
            let id = global.branches[call.branch].spec.branch_id.clone();
            global
                .apply(Event::CallStarted { branch: call.branch, phase: call.phase }, now)
                .unwrap();
            let attempt = global.branches[call.branch].attempts;
            writeln!(told, "→ {:?} {id}, attempt {attempt}", call.phase).unwrap();
        }
        told
    }

    fn reply(
        &mut self,
        id: &str,
        what: &str,
        retry_in: Duration,
    ) -> Result<String, Box<dyn Error>> {
        let now = self.now();
        let global = self.global.as_ref().expect("begin first");
        let (branch, known) = global.branch(&id.parse()?).ok_or("no such branch")?;
        let Call::InFlight(phase) = known.call else { return Err("no call is under way".into()) };
        let outcome = match what {
            "done" => Outcome::Done { reply: None },
            "refused" => Outcome::Refused(refusal()),
            "unknown" => unknown(false, false, now),
            "timeout" => unknown(true, false, now),
            "hopeless" => unknown(false, true, now),
            other => return Err(format!("no such reply: {other}").into()),
        };
        Ok(self.apply(Event::CallReturned { branch, phase, outcome, retry_in }))
    }

    fn show(&self) -> String {
        let global = self.global.as_ref().expect("begin first");
        let stuck =
            global.is_stuck(self.now(), StuckAfter { attempts: 3, time: Duration::from_secs(120) });
        let mut told = format!("{}{}", word(global.state), if stuck { ", stuck" } else { "" });
        for branch in &global.branches {
            write!(told, "; {} {}", branch.spec.branch_id, branch_word(&branch.state)).unwrap();
        }
        told + "\n"
    }
}

impl Runner for Story {
    type Command = Command;

    fn run(&mut self, command: &Command, _: &Context) -> Result<String, Box<dyn Error>> {
        let mut args = command.consume_args();
        let told = match command.name.as_str() {
            "begin" => {
                let timeout = humantime::parse_duration(args.take_key("timeout").unwrap_or("30s"))?;
                let drive = match args.take_key("drive").unwrap_or("initiator") {
                    "initiator" => Drive::Initiator,
                    "execute" => Drive::Coordinator { in_order: false },
                    "execute_in_order" => Drive::Coordinator { in_order: true },
                    other => return Err(format!("no such drive: {other}").into()),
                };
                let branches = rest(&mut args).into_iter().map(spec).collect();
                let new = new_transaction(drive, timeout, branches);
                *self = Self {
                    global: Some(GlobalTransaction::begin(XID, new, Timestamp(0))),
                    ..Self::default()
                };
                self.settle()
            }
            "register" => {
                self.apply(Event::Registered(rest(&mut args).into_iter().map(spec).collect()))
            }
            "confirm" => {
                let tried =
                    rest(&mut args).into_iter().map(str::parse).collect::<Result<_, _>>()?;
                self.apply(Event::DecisionRequested(DecisionRequest::Confirm {
                    tried,
                    result: None,
                }))
            }
            "cancel" => {
                let reason = args.next_pos().unwrap_or_default().to_owned();
                self.apply(Event::DecisionRequested(DecisionRequest::Cancel(
                    CancelCause::Requested { reason },
                )))
            }
            "at" => {
                self.now_ms = i64::try_from(
                    humantime::parse_duration(args.next_pos().ok_or("when?")?)?.as_millis(),
                )?;
                let told = self.apply(Event::Ticked);
                if told == "nothing changes\n" {
                    String::new()
                } else {
                    told.replace("nothing changes\n", "")
                }
            }
            "reply" => {
                let retry_in =
                    humantime::parse_duration(args.take_key("retry_in").unwrap_or("1s"))?;
                let (id, what) =
                    (args.next_pos().ok_or("whose?")?, args.next_pos().ok_or("what?")?);
                self.reply(id, what, retry_in)?
            }
            "hold" => {
                self.held = true;
                String::new()
            }
            "release" => {
                self.held = false;
                self.settle()
            }
            "crash" => {
                self.held = false;
                let Some(stored) = self.stored.clone() else {
                    return Ok("nothing was ever recorded\n".to_owned());
                };
                let told = format!("loaded {}\n", word(stored.state));
                self.global = Some(stored);
                told + &self
                    .apply(Event::Recovered { longest_pause: Duration::from_secs(60) })
                    .replace("nothing changes\n", "")
            }
            "retry" => self.apply(Event::RetryRequested),
            "resolve" => {
                let resolution = Resolution {
                    operator: "ann".to_owned(),
                    reason: "gone".to_owned(),
                    at: self.now(),
                };
                let branch_id = args.next_pos().ok_or("which?")?.parse()?;
                self.apply(Event::Resolved { branch_id, resolution })
            }
            "show" => self.show(),
            other => return Err(format!("no such command: {other}").into()),
        };
        args.reject_next()?;
        Ok(told)
    }
}

fn rest<'a>(args: &mut ArgumentConsumer<'a>) -> Vec<&'a str> {
    std::iter::from_fn(|| args.next_pos()).collect()
}

fn word(state: State) -> String {
    format!("{state:?}").to_lowercase()
}

fn branch_word(state: &BranchState) -> &'static str {
    match state {
        BranchState::Registered => "registered",
        BranchState::Tried => "tried",
        BranchState::Acknowledged => "acknowledged",
        BranchState::Resolved(_) => "resolved by hand",
    }
}

fn cause_word(cause: Option<&CancelCause>) -> String {
    match cause {
        None => "no cause".to_owned(),
        Some(CancelCause::Requested { reason }) => format!("requested: {reason}"),
        Some(CancelCause::Refused { refusal, .. }) => format!("refused: {}", refusal.reason),
        Some(CancelCause::TimedOut) => "timed out".to_owned(),
        Some(CancelCause::TryUnknown { branch_id, error }) => {
            format!("Try of {branch_id} unknown: {error}")
        }
        Some(CancelCause::CoordinatorRestarted) => "coordinator restarted".to_owned(),
    }
}

#[test]
fn stories() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/transaction/tests/stories");
    let mut stories: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    stories.sort();
    assert!(stories.len() >= 10, "where are they?");
    for story in stories {
        goldenscript::run(&mut Story::default(), &story)
            .unwrap_or_else(|error| panic!("{}: {error}", story.display()));
    }
}
