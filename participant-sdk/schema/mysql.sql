-- Handfast's fence: what this service did for each branch of a global transaction. MySQL 8.0, MariaDB 10.6, or newer.
--
-- One row for each branch, written in the same local transaction as the service's own work. Only the SDK writes here. Never
-- delete a row by hand: the SDK knows when nobody can ask for it any more (Fence::clean_up). All times are UTC milliseconds
-- since 1970 by this database's clock. For people there is a view: handfast_fence_readable.

CREATE TABLE IF NOT EXISTS handfast_fence (
    xid        BINARY(16)   NOT NULL COMMENT 'the global transaction: partition (2 bytes), epoch (4), sequence (6), nonce (4), big-endian',
    branch_id  BINARY(32)   NOT NULL COMMENT 'the branch: 1 to 32 bytes of text, filled up with zeros',
    state      SMALLINT     NOT NULL COMMENT '1 tried, 2 confirmed, 3 cancelled, 4 suspended: cancelled, never tried',
    action     VARCHAR(128) NOT NULL COMMENT 'what was asked for, such as inventory.deduct; written by Try, or by the Cancel that came first',
    payload    MEDIUMBLOB   NULL     COMMENT 'what Try got, at most 64 KiB; Confirm and Cancel get the same. NULL: never tried',
    reply      MEDIUMBLOB   NULL     COMMENT 'what Try answered, at most 64 KiB; a repeated Try answers the same. NULL: never tried',
    digest     BINARY(32)   NULL     COMMENT 'SHA-256 over action and payload: whether a Try repeats this one. NULL: never tried',
    expires_at BIGINT       NULL     COMMENT 'end of phase one, as the call that made the row says. NULL: it says none',
    created_at BIGINT       NOT NULL COMMENT 'when the row was made',
    changed_at BIGINT       NOT NULL COMMENT 'when state or reply last changed; the clean-up counts from here',
    seen       BIGINT       NOT NULL COMMENT 'calls that came for this branch, the first one included. 1: nobody has repeated it or gone on',
    asks       SMALLINT     NULL     COMMENT '1: the transaction may be lost without a Cancel, so this service asks about the branch from expires_at on. NULL: it does not',
    PRIMARY KEY (xid, branch_id),
    KEY handfast_fence_clean_up (changed_at),
    KEY handfast_fence_tried (state, expires_at),
    CONSTRAINT handfast_fence_state CHECK (state IN (1, 2, 3, 4))
) ENGINE = InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin
  COMMENT = 'Handfast: what this service did for each branch. All times: UTC milliseconds since 1970, this server''s clock';

CREATE OR REPLACE VIEW handfast_fence_readable AS
SELECT
    CONCAT(
        CONV(HEX(SUBSTR(xid, 1, 2)), 16, 10), '-',
        CONV(HEX(SUBSTR(xid, 3, 4)), 16, 10), '-',
        CONV(HEX(SUBSTR(xid, 7, 6)), 16, 10), '-',
        LOWER(HEX(SUBSTR(xid, 13, 4)))
    ) AS xid,
    CONVERT(TRIM(TRAILING x'00' FROM branch_id) USING utf8mb4) AS branch_id,
    CASE state WHEN 1 THEN 'tried' WHEN 2 THEN 'confirmed' WHEN 3 THEN 'cancelled' WHEN 4 THEN 'suspended' END AS state,
    action,
    LENGTH(payload) AS payload_bytes,
    LENGTH(reply) AS reply_bytes,
    TIMESTAMPADD(MICROSECOND, expires_at * 1000, '1970-01-01') AS expires_at,
    TIMESTAMPADD(MICROSECOND, created_at * 1000, '1970-01-01') AS created_at,
    TIMESTAMPADD(MICROSECOND, changed_at * 1000, '1970-01-01') AS changed_at,
    seen
FROM handfast_fence;
