//! What people read of samples of every kind.

use handfast_proto::time::timestamp;

use super::*;
use crate::cli::fixture::{BEGUN, NOW, samples};

#[test]
fn a_list_has_a_line_for_each() {
    assert_eq!(
        list(&samples(), NOW),
        "\
XID                NAME      STATE               BEGUN   DONE  NOTE
3-7-1042-9f3c01d2  checkout  confirming (stuck)  3m ago  2/3   points.spend: UNAVAILABLE connection refused (attempt 9)
3-7-1041-9f3c01d2  checkout  cancelled           3m ago  2/2   branch 2 refused: OUT_OF_STOCK only 2 left
3-7-1043-9f3c01d2  transfer  trying              now     0/0
3-7-1-9f3c01d2     checkout  confirmed           2h ago  1/1
"
    );
}

#[test]
fn a_stuck_one_says_what_it_waits_for_and_how_to_hurry_it() {
    let [stuck, ..] = samples();
    assert_eq!(
        show(&stuck, NOW, &TimeZone::fixed(jiff::tz::offset(1)), " --server http://b:1"),
        "\
checkout 3-7-1042-9f3c01d2 is CONFIRMING. It will be confirmed; nothing can change that.

begun     2026-11-21 10:14:03.123 +01:00 (3m ago)
decided   CONFIRM, 2026-11-21 10:14:03.223 +01:00 (2m ago)
labels    order=A-1042

BRANCH  ACTION        PARTICIPANT                     STATE       ATTEMPTS  NEXT    LAST ERROR
1       order.create  orders                          confirmed   1
2       points.spend  points (http://127.0.0.1:7703)  to confirm  9         in 12s  UNAVAILABLE connection refused (2s ago)
3       mail.send     mail                            resolved    4

Branch 3 was resolved by ann, 2026-11-21 10:16:03.123 +01:00 (1m ago): mail is gone

It is stuck: it waits for points to confirm branch 2 (points.spend), and retries.
  to retry now:            handfast retry --server http://b:1 3-7-1042-9f3c01d2
  if it can never answer:  handfast resolve --server http://b:1 3-7-1042-9f3c01d2 2 --operator NAME --reason \"what was done instead\"
"
    );
}

#[test]
fn a_refused_one_says_why() {
    let [_, cancelled, ..] = samples();
    assert_eq!(
        show(&cancelled, NOW, &TimeZone::UTC, ""),
        "\
checkout 3-7-1041-9f3c01d2 is CANCELLED.

begun     2026-11-21 09:14:03.123 +00:00 (3m ago), driven by the coordinator
decided   CANCEL, 2026-11-21 09:14:03.223 +00:00 (2m ago)
because   branch 2 refused: OUT_OF_STOCK only 2 left (sku=1042)
finished  2026-11-21 09:14:03.243 +00:00 (2m ago)

BRANCH  ACTION            PARTICIPANT  STATE      ATTEMPTS  NEXT  LAST ERROR
1       order.create      orders       cancelled  1
2       inventory.deduct  inventory    cancelled  1
"
    );
}

#[test]
fn one_that_is_trying_says_until_when() {
    let [_, _, trying, _] = samples();
    assert_eq!(
        show(&trying, NOW, &TimeZone::UTC, ""),
        "\
transfer 3-7-1043-9f3c01d2 is TRYING: there is no decision yet.

begun     2026-11-21 09:17:02.623 +00:00 (now)
expires   2026-11-21 09:17:32.623 +00:00 (in 29s)

It has no branches.
"
    );
}

#[test]
fn one_that_goes_well_is_not_to_be_hurried() {
    let [mut stuck, ..] = samples();
    stuck.stuck = false;
    let failing = show(&stuck, NOW, &TimeZone::UTC, "");
    assert!(
        failing.contains("handfast retry") && !failing.contains("handfast resolve"),
        "{failing}"
    );
    stuck.branches[1].last_error = None;
    let well = show(&stuck, NOW, &TimeZone::UTC, "");
    assert!(
        well.contains("\nIt waits for points to confirm") && !well.contains("handfast"),
        "{well}"
    );
}

#[test]
fn what_was_done_is_said() {
    let [stuck, _, trying, confirmed] = samples();
    assert_eq!(
        retried(&stuck, ""),
        "checkout 3-7-1042-9f3c01d2 is CONFIRMING. It will be confirmed; nothing can change that.\n\
         Retrying now: branch 2 (points.spend).\n\
         See the result:  handfast show 3-7-1042-9f3c01d2\n"
    );
    assert!(retried(&trying, "").ends_with("There is nothing to retry: it is not decided.\n"));
    assert!(retried(&confirmed, "").ends_with("There is nothing to retry.\n"));
    assert_eq!(
        resolved(&stuck, "3"),
        "Branch 3 is resolved, by ann: mail is gone\n\
         checkout 3-7-1042-9f3c01d2 is CONFIRMING. It will be confirmed; nothing can change that.\n"
    );
}

#[test]
fn what_nobody_should_send_does_no_harm() {
    let far = Some(prost_types::Timestamp { seconds: i64::MAX, nanos: -1 });
    let odd = pb::Transaction { state: 99, begun_at: far, ..pb::Transaction::default() };
    assert!(show(&odd, NOW, &TimeZone::UTC, "").contains("does not exist"));
    assert!(list(&[odd], Timestamp(i64::MIN)).contains("unspecified"));
    assert!(resolved(&pb::Transaction::default(), "9").starts_with("Branch 9"));
}

#[test]
fn ages_are_short() {
    let ages = [-999, 999, 1000, 59_999, 60_000, 3_600_000, 172_799_000, 172_800_000]
        .map(|age| ago(Timestamp(BEGUN + age), &timestamp(BEGUN)));
    assert_eq!(ages, ["now", "now", "1s ago", "59s ago", "1m ago", "1h ago", "47h ago", "2d ago"]);
    assert_eq!(ago(Timestamp(0), &timestamp(61_000)), "in 1m");
}

#[test]
fn long_notes_are_cut_between_characters() {
    let [mut stuck, ..] = samples();
    stuck.branches[1].last_error.as_mut().unwrap().message = "é".repeat(100);
    let shown = list(&[stuck], NOW);
    let note = shown.lines().nth(1).unwrap().split("  ").last().unwrap().trim();
    assert_eq!(note.chars().count(), NOTE_CHARS_MAX + 1, "{shown}");
    assert!(note.ends_with('…'), "{note}");
}

#[test]
fn texts_of_others_stay_on_their_line() {
    let [mut stuck, mut refused, ..] = samples();
    stuck.name = "checkout\nBranch 9 is resolved".to_owned();
    stuck.branches[1].last_error.as_mut().unwrap().message = "down\r\nand \u{202e}out".to_owned();
    let metadata = &mut refused.refusal.as_mut().unwrap().metadata;
    metadata.insert("note\n".to_owned(), "two\nlines".to_owned());
    for transaction in [&mut stuck, &mut refused] {
        on_one_line(transaction);
    }
    assert!(show(&stuck, NOW, &TimeZone::UTC, "").starts_with("checkout Branch 9 is resolved "));
    let shown = list(&[stuck], NOW);
    assert!(shown.contains("down  and  out"), "{shown}");
    assert!(show(&refused, NOW, &TimeZone::UTC, "").contains("note =two lines"));
}

#[test]
fn json_means_the_same_and_does_not_turn_around_on_a_terminal() {
    let name = "a\u{202e}b\n\"";
    let line = crate::cli::json::line(&name);
    assert_eq!(line, "\"a\\u202eb\\n\\\"\"\n");
    assert_eq!(serde_json::from_str::<String>(&line).unwrap(), name);
}
