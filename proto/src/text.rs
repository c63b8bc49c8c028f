//! Texts that others wrote (names, reasons, error messages), made fit for a log line, a record or a terminal.

use std::collections::BTreeMap;

/// Whether a terminal would act on a character instead of showing it: control characters, line breaks, and marks that change
/// the direction of text.
#[must_use]
pub fn is_unprintable(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{061c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// The text on one line: each unprintable character becomes a space.
#[must_use]
pub fn one_line(text: &str) -> String {
    text.replace(is_unprintable, " ")
}

/// The text, truncated to whole characters with an ellipsis if it has more bytes than `bytes_max`.
#[must_use]
pub fn cut(mut text: String, bytes_max: usize) -> String {
    if text.len() > bytes_max {
        text.truncate(text.floor_char_boundary(bytes_max.saturating_sub(ELLIPSIS.len())));
        text.push_str(ELLIPSIS);
    }
    text
}

/// What is kept of a text: its start, of at most `bytes_max` bytes, on one line.
#[must_use]
pub fn kept(text: &str, bytes_max: usize) -> String {
    cut(one_line(text), bytes_max)
}

/// The first `chars_max` characters of the text, and an ellipsis if there are more.
#[must_use]
pub fn first_chars(text: &str, chars_max: usize) -> String {
    match text.char_indices().nth(chars_max) {
        Some((end, _)) => format!("{}{ELLIPSIS}", &text[..end]),
        None => text.to_owned(),
    }
}

/// The labels with these keys, for a log line: `order=1042 customer=ann`. `None` if there are none of them.
#[must_use]
pub fn labels(labels: &BTreeMap<String, String>, keys: &[String]) -> Option<String> {
    let found = keys.iter().filter_map(|key| Some(format!("{key}={}", labels.get(key)?)));
    let found = found.collect::<Vec<_>>().join(" ");
    (!found.is_empty()).then(|| one_line(&found))
}

const ELLIPSIS: &str = "…";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_labels_that_are_asked_for_are_shown() {
        let of = |pairs: &[(&str, &str)]| {
            pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
        };
        let all = of(&[("order", "10\n42"), ("customer", "ann"), ("card", "secret")]);
        let keys = ["order", "shop", "customer"].map(str::to_owned);
        assert_eq!(labels(&all, &keys).as_deref(), Some("order=10 42 customer=ann"));
        assert_eq!(labels(&all, &[]), None);
        assert_eq!(labels(&of(&[]), &keys), None);
    }

    #[test]
    fn line_breaks_and_controls_become_spaces() {
        assert_eq!(one_line("one\ntwo\r\nthree\tfour"), "one two  three four");
        assert_eq!(one_line("\u{1b}[31mred\u{7f}\u{85}\u{0}"), " [31mred   ");
        assert_eq!(one_line("line\u{2028}and paragraph\u{2029}"), "line and paragraph ");
    }

    #[test]
    fn marks_of_direction_become_spaces() {
        let marks =
            ["\u{61c}", "\u{200e}", "\u{200f}", "\u{202a}", "\u{202e}", "\u{2066}", "\u{2069}"];
        for mark in marks {
            assert_eq!(one_line(&format!("a{mark}b")), "a b", "{mark:?}");
        }
    }

    #[test]
    fn all_other_characters_stay() {
        // With neighbours of the marks: thin space, dashes, word joiner.
        let text = "déjà vu, 库存不足, שלום 👩‍👧 \u{2009}\u{2010}\u{202f}\u{2060}";
        assert_eq!(one_line(text), text);
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        assert_eq!(cut("short".to_owned(), 5), "short");
        assert_eq!(cut("longer".to_owned(), 5), "lo…");
        // 库 has three bytes, and so has the ellipsis.
        assert_eq!(cut("库存不足".to_owned(), 12), "库存不足");
        assert_eq!(cut("库存不足".to_owned(), 11), "库存…");
        assert_eq!(cut("库存不足".to_owned(), 9), "库存…");
        assert_eq!(cut("库存不足".to_owned(), 8), "库…");
        assert_eq!(cut("库存不足".to_owned(), 3), "…");
    }

    #[test]
    fn the_start_of_a_text_is_kept_on_one_line() {
        assert_eq!(kept("库存\n不足", 13), "库存 不足");
        assert_eq!(kept("库存\n不足", 12), "库存 …");
        // A mark of direction has three bytes. Its space has one.
        assert_eq!(kept("a\u{202e}b", 3), "a b");
    }

    #[test]
    fn the_first_characters_are_counted_and_not_their_bytes() {
        assert_eq!(first_chars("库存不足", 4), "库存不足");
        assert_eq!(first_chars("库存不足", 3), "库存不…");
        assert_eq!(first_chars("", 3), "");
    }
}
