-- Handfast's fence: what this service did for each branch of a global transaction. PostgreSQL 14 or newer.
--
-- One row for each branch, written in the same local transaction as the service's own work. Only the SDK writes here. Never
-- delete a row by hand: the SDK knows when nobody can ask for it any more (Fence::clean_up). All times are UTC milliseconds
-- since 1970 by this database's clock. For people there is a view: handfast_fence_readable.

CREATE TABLE IF NOT EXISTS handfast_fence (
    xid        bytea    NOT NULL,
    branch_id  bytea    NOT NULL,
    state      smallint NOT NULL CHECK (state IN (1, 2, 3, 4)),
    action     text     NOT NULL,
    payload    bytea,
    reply      bytea,
    digest     bytea,
    expires_at bigint,
    created_at bigint   NOT NULL,
    changed_at bigint   NOT NULL,
    seen       bigint   NOT NULL,
    asks       smallint,
    PRIMARY KEY (xid, branch_id)
);

COMMENT ON TABLE handfast_fence IS 'Handfast: what this service did for each branch. All times: UTC milliseconds since 1970, this server''s clock';
COMMENT ON COLUMN handfast_fence.xid IS 'the global transaction: partition (2 bytes), epoch (4), sequence (6), nonce (4), big-endian';
COMMENT ON COLUMN handfast_fence.branch_id IS 'the branch: 1 to 32 bytes of text, filled up with zeros to 32';
COMMENT ON COLUMN handfast_fence.state IS '1 tried, 2 confirmed, 3 cancelled, 4 suspended: cancelled, never tried';
COMMENT ON COLUMN handfast_fence.action IS 'what was asked for, such as inventory.deduct; written by Try, or by the Cancel that came first';
COMMENT ON COLUMN handfast_fence.payload IS 'what Try got, at most 64 KiB; Confirm and Cancel get the same. NULL: never tried';
COMMENT ON COLUMN handfast_fence.reply IS 'what Try answered, at most 64 KiB; a repeated Try answers the same. NULL: never tried';
COMMENT ON COLUMN handfast_fence.digest IS 'SHA-256 over action and payload: whether a Try repeats this one. NULL: never tried';
COMMENT ON COLUMN handfast_fence.expires_at IS 'end of phase one, as the call that made the row says. NULL: it says none';
COMMENT ON COLUMN handfast_fence.created_at IS 'when the row was made';
COMMENT ON COLUMN handfast_fence.changed_at IS 'when state or reply last changed; the clean-up counts from here';
COMMENT ON COLUMN handfast_fence.asks IS '1: the transaction may be lost without a Cancel, so this service asks about the branch from expires_at on. NULL: it does not';
COMMENT ON COLUMN handfast_fence.seen IS 'calls that came for this branch, the first one included. 1: nobody has repeated it or gone on';

-- For the clean-up, which deletes what is final and old.
CREATE INDEX IF NOT EXISTS handfast_fence_clean_up ON handfast_fence (changed_at) WHERE state <> 1;

-- For the inquiry, which asks about what is tried and overdue. It holds only what is tried, so it stays small.
CREATE INDEX IF NOT EXISTS handfast_fence_tried ON handfast_fence (expires_at, xid, branch_id) WHERE state = 1;

CREATE OR REPLACE VIEW handfast_fence_readable AS
SELECT
    concat_ws('-',
        ('x' || lpad(encode(substring(xid FROM 1 FOR 2), 'hex'), 16, '0'))::bit(64)::bigint,
        ('x' || lpad(encode(substring(xid FROM 3 FOR 4), 'hex'), 16, '0'))::bit(64)::bigint,
        ('x' || lpad(encode(substring(xid FROM 7 FOR 6), 'hex'), 16, '0'))::bit(64)::bigint,
        encode(substring(xid FROM 13 FOR 4), 'hex')
    ) AS xid,
    convert_from(rtrim(branch_id, '\x00'::bytea), 'UTF8') AS branch_id,
    CASE state WHEN 1 THEN 'tried' WHEN 2 THEN 'confirmed' WHEN 3 THEN 'cancelled' WHEN 4 THEN 'suspended' END AS state,
    action,
    length(payload) AS payload_bytes,
    length(reply) AS reply_bytes,
    to_timestamp(expires_at / 1000.0) AS expires_at,
    to_timestamp(created_at / 1000.0) AS created_at,
    to_timestamp(changed_at / 1000.0) AS changed_at,
    seen
FROM handfast_fence;
