//! How a participant says no, and how it says that it does not know.
//!
//! These two are never mixed up. A [`Refusal`] is an answer: the service looked, and repeating will not help. Any other error
//! is "unknown": nobody can tell from it whether something was done.

use std::{collections::BTreeMap, error::Error, fmt};

/// Any error, as `?` makes it.
pub type BoxError = Box<dyn Error + Send + Sync>;

/// A decided "no": out of stock, no such account, over the limit. Repeating will not help.
///
/// It ends the global transaction with Cancel and reaches the initiator as it was written, unless it is longer than 4 KiB
/// (its message: 1 KiB); then texts are cut and the metadata that no longer fits is left out.
///
/// ```
/// # use handfast::Refusal;
/// let refusal = Refusal::new("OUT_OF_STOCK").message("2 on hand").with("sku", 1042);
/// assert_eq!(refusal.to_string(), "OUT_OF_STOCK: 2 on hand");
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Refusal {
    /// Why, for programs: `OUT_OF_STOCK`.
    pub reason: String,
    /// Who says so. Empty: the name of the participant, once it is sent.
    pub domain: String,
    /// Why, for people.
    pub message: String,
    /// Details for programs.
    pub metadata: BTreeMap<String, String>,
}

// Not an `Error`: `TryError` is made from any error, and a refusal would be taken for one of them.
impl Refusal {
    /// A refusal with this reason, a code for programs such as `OUT_OF_STOCK`.
    #[must_use]
    pub fn new(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), ..Self::default() }
    }

    /// Adds the words for people.
    #[must_use]
    pub fn message(mut self, message: impl Into<String>) -> Self {
        self.message = message.into();
        self
    }

    /// Adds a detail for programs.
    #[must_use]
    pub fn with(mut self, key: impl Into<String>, value: impl fmt::Display) -> Self {
        self.metadata.insert(key.into(), value.to_string());
        self
    }

    /// What Handfast itself says on behalf of a participant. A domain of its own, so that a service's EXPIRED (a voucher, say)
    /// is not taken for ours.
    pub(crate) fn of_handfast(reason: &str, message: impl Into<String>) -> Self {
        let domain = handfast_proto::reason::DOMAIN.to_owned();
        Self { domain, ..Self::new(reason).message(message) }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.message.is_empty() {
            f.write_str(&self.reason)
        } else {
            write!(f, "{}: {}", self.reason, self.message)
        }
    }
}

/// Why a Try did not reserve.
///
/// `?` turns every error into [`TryError::Unknown`]; only a [`Refusal`] becomes [`TryError::Refused`]. In both cases the local
/// transaction is rolled back. Like `anyhow::Error`, and for the same reason, this is not itself an [`Error`].
#[derive(Debug)]
pub enum TryError {
    /// No, and repeating will not help.
    Refused(Refusal),
    /// It failed. The initiator will cancel.
    Unknown(BoxError),
}

impl<E: Error + Send + Sync + 'static> From<E> for TryError {
    fn from(error: E) -> Self {
        Self::Unknown(Box::new(error))
    }
}

impl From<Refusal> for TryError {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// Why a Confirm or a Cancel was not done. It is repeated in any case: the decision stands, and there is no way to refuse it.
///
/// `?` turns every error into [`Failed::Retry`]. In both cases the local transaction is rolled back.
#[derive(Debug)]
pub enum Failed {
    /// It failed, and may well succeed later.
    Retry(BoxError),
    /// It failed, and will fail again until a person looks. The text, which operators see at once, says what
    /// a person must look at.
    NeedsAttention(String),
}

impl<E: Error + Send + Sync + 'static> From<E> for Failed {
    fn from(error: E) -> Self {
        Self::Retry(Box::new(error))
    }
}

/// Why the closure of a [`run`](crate::TransactionBuilder::run) wants its transaction cancelled.
///
/// `?` makes one of every error, and `.into()` of every text. Like `anyhow::Error`, and for the same reason, this is not itself an
/// [`Error`].
#[derive(Debug)]
pub struct WorkError(pub(crate) BoxError);

impl<E: Into<BoxError>> From<E> for WorkError {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

/// An error and what caused it, in one line.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Many errors already print their cause.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_mark_is_unknown_and_a_refusal_is_not() {
        fn fails() -> Result<(), TryError> {
            Err(std::io::Error::other("disk"))?
        }
        fn refuses() -> Result<(), TryError> {
            Err(Refusal::new("NO"))?
        }
        assert!(matches!(fails(), Err(TryError::Unknown(error)) if error.to_string() == "disk"));
        assert!(matches!(refuses(), Err(TryError::Refused(refusal)) if refusal.reason == "NO"));
    }

    #[test]
    fn a_chain_says_each_cause_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("no answer")]
        struct Outer(#[source] std::io::Error);
        assert_eq!(chain(&Outer(std::io::Error::other("reset"))), "no answer: reset");
    }
}
