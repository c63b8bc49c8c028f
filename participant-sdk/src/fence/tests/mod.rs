//! The fence on real databases. One suite for all of them: it and its shop are compiled once for each. What differs is in the files of
//! their names, as is what only one of them can do.

#[cfg(feature = "mysql")]
mod mysql;
#[cfg(feature = "postgres")]
mod postgres;
pub(crate) mod sqlite;
