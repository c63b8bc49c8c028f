//! The names of global transactions and branches.

use std::{fmt, str::FromStr};

/// The name of a global transaction, made by the coordinator at Begin.
///
/// Printed `3-7-1042-9f3c01d2`: partition, epoch, sequence, nonce. The partition tells any node which coordinator to ask. Within
/// a partition, xids sort by age, so that inserts go to the end of the index. The 16 bytes, big-endian, sort the same way.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Xid {
    /// The partition that the transaction belongs to.
    pub partition: u16,
    /// The ownership of the partition in which the xid was made: 1, 2, 3, …
    pub epoch: u32,
    /// Numbers the transactions of one epoch: 1 to 2^48 - 1.
    pub sequence: u64,
    /// Random at each takeover, so that xids do not repeat after a store was deleted or restored.
    pub nonce: u32,
}

impl Xid {
    /// The largest sequence number: 48 bits.
    pub const SEQUENCE_MAX: u64 = (1 << 48) - 1;

    /// The 16 bytes that databases store.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..2].copy_from_slice(&self.partition.to_be_bytes());
        bytes[2..6].copy_from_slice(&self.epoch.to_be_bytes());
        bytes[6..12].copy_from_slice(&self.sequence.to_be_bytes()[2..]);
        bytes[12..].copy_from_slice(&self.nonce.to_be_bytes());
        bytes
    }

    /// Parses what [`Xid::to_bytes`] returned.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        let number = u128::from_be_bytes(bytes);
        let field = |shift: u32, bits: u32| {
            u64::try_from((number >> shift) & ((1 << bits) - 1)).expect("fits its bits")
        };
        Self {
            partition: u16::try_from(field(112, 16)).expect("16 bits"),
            epoch: u32::try_from(field(80, 32)).expect("32 bits"),
            sequence: field(32, 48),
            nonce: u32::try_from(field(0, 32)).expect("32 bits"),
        }
    }
}

impl fmt::Display for Xid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{}-{:08x}", self.partition, self.epoch, self.sequence, self.nonce)
    }
}

impl fmt::Debug for Xid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not an xid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no xid: one looks like 3-7-1042-9f3c01d2 (partition, epoch, sequence, eight hexadecimal digits)"
)]
pub struct InvalidXid(
    /// The text, cut to 64 characters.
    pub String,
);

impl FromStr for Xid {
    type Err = InvalidXid;

    /// Accepts only the printed form of an [`Xid`], so that each transaction has exactly one name.
    fn from_str(text: &str) -> Result<Self, InvalidXid> {
        fn parse(text: &str) -> Option<Xid> {
            let mut parts = text.split('-');
            let xid = Xid {
                partition: parts.next()?.parse().ok()?,
                epoch: parts.next()?.parse().ok()?,
                sequence: parts.next()?.parse().ok()?,
                nonce: u32::from_str_radix(parts.next()?, 16).ok()?,
            };
            // Comparing with the printed form rejects leading zeros, signs, capitals and a fifth part at once.
            (xid.sequence <= Xid::SEQUENCE_MAX && xid.to_string() == text).then_some(xid)
        }
        parse(text).ok_or_else(|| InvalidXid(text.chars().take(64).collect()))
    }
}

/// The name of a branch within its global transaction: 1 to 32 bytes of `[a-z0-9._-]`.
///
/// Whoever registers the branch chooses the id, and uses the same id in every retry. A nested service puts the id of its own
/// branch in front: [`BranchId::child`].
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BranchId(String);

impl BranchId {
    /// The longest id, in bytes.
    pub const BYTES_MAX: usize = 32;

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The id of the `n`th branch below this one: `2` and 1 give `2.1`.
    ///
    /// # Errors
    ///
    /// When the result is longer than [`BranchId::BYTES_MAX`], because services are nested too deeply.
    pub fn child(&self, n: usize) -> Result<Self, InvalidBranchId> {
        format!("{self}.{n}").parse()
    }

    /// The id padded with zeros to 32 bytes: a fixed-width key for databases.
    #[must_use]
    pub fn to_fixed(&self) -> [u8; Self::BYTES_MAX] {
        let mut bytes = [0; Self::BYTES_MAX];
        bytes[..self.0.len()].copy_from_slice(self.0.as_bytes());
        bytes
    }
}

impl fmt::Display for BranchId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for BranchId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not a branch id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no branch id: those are 1 to 32 bytes of a-z, 0-9, dot, dash and underscore")]
pub struct InvalidBranchId(
    /// The text, cut to 64 characters.
    pub String,
);

impl FromStr for BranchId {
    type Err = InvalidBranchId;

    fn from_str(text: &str) -> Result<Self, InvalidBranchId> {
        let fits = (1..=Self::BYTES_MAX).contains(&text.len())
            && text
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b));
        if fits {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidBranchId(text.chars().take(64).collect()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const XID: Xid = Xid { partition: 3, epoch: 7, sequence: 1042, nonce: 0x9f3c_01d2 };

    #[test]
    fn an_xid_reads_back_from_text_and_bytes() {
        let largest = Xid {
            partition: u16::MAX,
            epoch: u32::MAX,
            sequence: Xid::SEQUENCE_MAX,
            nonce: u32::MAX,
        };
        for xid in [XID, largest, Xid { partition: 0, epoch: 0, sequence: 0, nonce: 0 }] {
            assert_eq!(xid.to_string().parse(), Ok(xid));
            assert_eq!(Xid::from_bytes(xid.to_bytes()), xid);
        }
        assert_eq!(XID.to_string(), "3-7-1042-9f3c01d2");
    }

    #[test]
    fn xids_sort_by_age_as_bytes_too() {
        let mut xids = [
            Xid { sequence: 1043, nonce: 0, ..XID },
            Xid { epoch: 8, sequence: 1, ..XID },
            XID,
            Xid { partition: 4, epoch: 1, sequence: 1, ..XID },
        ];
        xids.sort();
        assert_eq!(xids[0], XID);
        assert!(xids.is_sorted_by_key(|xid| xid.to_bytes()));
    }

    #[test]
    fn what_is_no_xid_is_refused_with_an_example() {
        for text in [
            "",
            "3",
            "3-7-1042",
            "3-7-1042-9f3c01d2-1",
            "03-7-1042-9f3c01d2",
            "+3-7-1042-9f3c01d2",
            "3-7-1042-9F3C01D2",
            "3-7-1042-9f3c01d",
            "65536-7-1042-9f3c01d2",
            "3-7-281474976710656-9f3c01d2",
            " 3-7-1042-9f3c01d2",
        ] {
            let error = text.parse::<Xid>().unwrap_err();
            assert!(error.to_string().contains("3-7-1042-9f3c01d2"), "{error}");
        }
        assert_eq!("é".repeat(1000).parse::<Xid>().unwrap_err().0.chars().count(), 64);
    }

    #[test]
    fn branch_ids_are_short_and_plain() {
        for text in ["1", "2.1", "stock", "a-b_c.9", &"x".repeat(32)] {
            assert_eq!(text.parse::<BranchId>().unwrap().as_str(), text);
        }
        for text in ["", "A", "a b", "é", "a/b", &"x".repeat(33)] {
            assert!(text.parse::<BranchId>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn nested_ids_have_their_parent_in_front() {
        let parent: BranchId = "2".parse().unwrap();
        let child = parent.child(1).unwrap();
        assert_eq!(child.as_str(), "2.1");
        assert_eq!(child.to_fixed()[..4], *b"2.1\0");
        assert!("x".repeat(31).parse::<BranchId>().unwrap().child(1).is_err());
    }
}
