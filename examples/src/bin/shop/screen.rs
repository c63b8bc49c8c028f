//! What people see: lines, in colour where that is wanted, and one line that is painted again and again while something runs.

use std::{
    env,
    io::{self, IsTerminal as _, Write as _},
};

/// Where the talk goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Screen {
    /// stdout is for a program.
    to_stderr: bool,
    is_terminal: bool,
    /// How to paint for it.
    pub(crate) paint: Paint,
}

/// Puts colour into texts, or leaves them alone.
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

    /// Whether a line can be painted again.
    pub(crate) fn repaints(self) -> bool {
        self.is_terminal
    }

    pub(crate) fn line(self, text: &str) {
        self.write(&format!("{text}\n"));
    }

    /// A line that belongs to the title above it.
    pub(crate) fn inner(self, text: &str) {
        self.line(&format!("   {text}"));
    }

    /// A title, with some room before it.
    pub(crate) fn title(self, text: &str) {
        self.line(&format!("\n{}", self.paint.bold(text)));
    }

    /// Replaces what was painted last. An empty text wipes it out.
    pub(crate) fn repaint(self, text: &str) {
        self.write(&format!("\r\x1b[2K{}{text}", if text.is_empty() { "" } else { "   " }));
    }

    fn write(self, text: &str) {
        // If nobody reads any more, there is nobody to tell.
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

    /// For what is neither: refused, repeated, given back.
    pub(crate) fn mixed(self, text: &str) -> String {
        self.with("33", text)
    }

    /// For what was done from outside.
    pub(crate) fn outside(self, text: &str) -> String {
        self.with("35", text)
    }

    fn with(self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}
