//! Terminal output: lines, with colour where supported, and one progress line that is repainted.

use std::{
    env,
    io::{self, IsTerminal as _, Write as _},
};

/// The output stream.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Screen {
    /// Print to stderr, because stdout carries the JSON result.
    to_stderr: bool,
    is_terminal: bool,
    /// How to colour text on this stream.
    pub(crate) paint: Paint,
}

/// Colours text, or returns it unchanged.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Paint {
    pub(crate) colour: bool,
}

impl Screen {
    pub(crate) fn new(to_stderr: bool) -> Self {
        let is_terminal =
            if to_stderr { io::stderr().is_terminal() } else { io::stdout().is_terminal() };
        let unwanted = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { to_stderr, is_terminal, paint: Paint { colour: is_terminal && !unwanted } }
    }

    /// Whether a line can be repainted.
    pub(crate) fn repaints(self) -> bool {
        self.is_terminal
    }

    pub(crate) fn line(self, text: &str) {
        self.write(&format!("{text}\n"));
    }

    /// Prints an indented line below a title.
    pub(crate) fn inner(self, text: &str) {
        self.line(&format!("   {text}"));
    }

    /// Prints a title with a blank line before it.
    pub(crate) fn title(self, text: &str) {
        self.line(&format!("\n{}", self.paint.bold(text)));
    }

    /// Replaces the line that was painted last. An empty text erases it.
    pub(crate) fn repaint(self, text: &str) {
        self.write(&format!("\r\x1b[2K{}{text}", if text.is_empty() { "" } else { "   " }));
    }

    fn write(self, text: &str) {
        // Write errors are ignored: the reader has closed the stream.
        let _nobody = if self.to_stderr {
            io::stderr().lock().write_all(text.as_bytes())
        } else {
            let mut stdout = io::stdout().lock();
            stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush())
        };
    }
}

impl Paint {
    pub(crate) fn bold(self, text: &str) -> String {
        self.with("1", text)
    }

    pub(crate) fn dim(self, text: &str) -> String {
        self.with("2", text)
    }

    pub(crate) fn good(self, text: &str) -> String {
        self.with("32", text)
    }

    pub(crate) fn bad(self, text: &str) -> String {
        self.with("31", text)
    }

    /// For results that are neither good nor bad: refused, repeated, given back.
    pub(crate) fn mixed(self, text: &str) -> String {
        self.with("33", text)
    }

    /// For events that the walk caused, such as a kill.
    pub(crate) fn outside(self, text: &str) -> String {
        self.with("35", text)
    }

    fn with(self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}
