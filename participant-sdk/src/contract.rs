//! What both sides of a call must agree on: the action's name, its arguments and its reply.
//!
//! A contract names no database and no server, so it fits a small crate that participants and initiators share.

use std::time::Duration;

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};

use crate::error::BoxError;

/// How long one attempt of a Try may take by default.
pub(crate) const TRY_TIMEOUT: Duration = Duration::from_secs(5);

/// One action, as initiator and participant both know it.
///
/// ```
/// use handfast::{Contract, Json};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Serialize, Deserialize)]
/// pub struct Deduct {
///     pub sku: i64,
///     pub quantity: i64,
/// }
///
/// /// Takes goods off the shelf. The reply says how many are left.
/// pub struct DeductStock;
///
/// impl Contract for DeductStock {
///     const NAME: &'static str = "inventory.deduct";
///     type Args = Json<Deduct>;
///     type Reply = Json<i64>;
/// }
/// ```
pub trait Contract: Send + Sync + 'static {
    /// The name that travels: 1 to 128 bytes, by custom `participant.verb`.
    const NAME: &'static str;
    /// What Try gets. The fence keeps it, and Confirm and Cancel get the same.
    type Args: Payload;
    /// What Try gives back. The fence keeps it, and a repeated Try gives the same.
    type Reply: Payload;
    /// How long one attempt of a Try may take, whatever the transaction's timeout. A Try that takes longer has no clear answer, and
    /// its transaction is cancelled.
    const TRY_TIMEOUT: Duration = TRY_TIMEOUT;
}

/// Something that can be sent: bytes with a content type.
pub trait Payload: Sized + Send + Sync + 'static {
    /// What the bytes are, for whoever only displays them.
    const CONTENT_TYPE: &'static str;

    /// The value as bytes. A repeat must give the same bytes, or its Try is refused as another call.
    ///
    /// # Errors
    ///
    /// When the value has no such form.
    fn encode(&self) -> Result<Bytes, BoxError>;

    /// Reads what [`Payload::encode`] wrote, also when an older version of this program did.
    ///
    /// # Errors
    ///
    /// When the bytes are no such value.
    fn decode(bytes: &[u8]) -> Result<Self, BoxError>;
}

/// A payload in JSON.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Json<T>(pub T);

impl<T: Serialize + DeserializeOwned + Send + Sync + 'static> Payload for Json<T> {
    const CONTENT_TYPE: &'static str = "application/json";

    fn encode(&self) -> Result<Bytes, BoxError> {
        Ok(serde_json::to_vec(&self.0)?.into())
    }

    fn decode(bytes: &[u8]) -> Result<Self, BoxError> {
        Ok(Self(serde_json::from_slice(bytes)?))
    }
}

/// A payload that is a protobuf message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Proto<T>(pub T);

impl<T: prost::Message + Default + 'static> Payload for Proto<T> {
    const CONTENT_TYPE: &'static str = "application/protobuf";

    fn encode(&self) -> Result<Bytes, BoxError> {
        Ok(self.0.encode_to_vec().into())
    }

    fn decode(bytes: &[u8]) -> Result<Self, BoxError> {
        Ok(Self(T::decode(bytes)?))
    }
}

/// The empty payload. Bytes that arrive are ignored, so that a reply can be added to a contract later.
impl Payload for () {
    const CONTENT_TYPE: &'static str = "application/octet-stream";

    fn encode(&self) -> Result<Bytes, BoxError> {
        Ok(Bytes::new())
    }

    fn decode(_: &[u8]) -> Result<Self, BoxError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_read_back() {
        let json = Json(vec![1, 2, 3]);
        assert_eq!(Json::decode(&json.encode().unwrap()).unwrap(), json);
        let proto = Proto(String::from("seven"));
        assert_eq!(Proto::decode(&proto.encode().unwrap()).unwrap(), proto);
        assert!(().encode().unwrap().is_empty());
        <()>::decode(b"anything").unwrap();
    }

    #[test]
    fn what_is_no_payload_is_an_error() {
        assert!(Json::<i64>::decode(b"").is_err());
        assert!(Json::<i64>::decode(b"\"seven\"").is_err());
        assert!(Proto::<String>::decode(b"\xff").is_err());
    }
}
