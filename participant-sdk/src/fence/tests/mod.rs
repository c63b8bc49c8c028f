//! The fence on real databases. The test suite and its shop are compiled once per database. Each database's own file contains
//! its settings, and the tests that only this database can run.

#[cfg(feature = "mysql")]
mod mysql;
#[cfg(feature = "postgres")]
mod postgres;
pub(crate) mod sqlite;
