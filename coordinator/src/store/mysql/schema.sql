-- Version 1. Times are UTC milliseconds since 1970. Ids are binary and of fixed width; the views at the end show them as people
-- write them. Only the coordinator writes here.

CREATE TABLE IF NOT EXISTS `partition` (
    `partition` SMALLINT UNSIGNED NOT NULL PRIMARY KEY COMMENT '0 to 15: the slice of all xids; fixed when the store is made',
    epoch       INT UNSIGNED NOT NULL COMMENT 'grows by one with each owner',
    position    BIGINT NOT NULL COMMENT 'number of the latest batch of this epoch; each batch moves it by one',
    owner       VARCHAR(128) COMMENT 'the process that owns it, for people; NULL: handed back at an orderly end'
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin COMMENT = 'who may write: every batch checks epoch and position';

INSERT IGNORE INTO `partition` (`partition`, epoch, position) VALUES
    (0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0), (4, 0, 0), (5, 0, 0), (6, 0, 0), (7, 0, 0),
    (8, 0, 0), (9, 0, 0), (10, 0, 0), (11, 0, 0), (12, 0, 0), (13, 0, 0), (14, 0, 0), (15, 0, 0);

CREATE TABLE IF NOT EXISTS epoch (
    `partition` SMALLINT UNSIGNED NOT NULL COMMENT 'whose',
    epoch       INT UNSIGNED NOT NULL COMMENT 'which',
    nonce       INT UNSIGNED NOT NULL COMMENT '32 random bits, part of every xid of this epoch',
    owner       VARCHAR(128) NOT NULL COMMENT 'the process that took it over, for people',
    taken_at    BIGINT NOT NULL COMMENT 'when',
    PRIMARY KEY (`partition`, epoch)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin COMMENT = 'every takeover there ever was';

CREATE TABLE IF NOT EXISTS global_transaction (
    xid              BINARY(16) NOT NULL PRIMARY KEY COMMENT 'partition (2 bytes), epoch (4), sequence (6), nonce (4), big-endian',
    name             VARCHAR(128) NOT NULL COMMENT 'what kind of operation, as its initiator calls it',
    drive            TINYINT NOT NULL COMMENT 'who calls the Trys: 1 the initiator, 2 the coordinator at once, 3 in order',
    state            TINYINT NOT NULL COMMENT '1 trying, 2 confirming, 3 cancelling, 4 confirmed, 5 cancelled',
    labels           TEXT NOT NULL COMMENT 'JSON object of strings, from the initiator',
    begun_at         BIGINT NOT NULL COMMENT 'when the coordinator took it in',
    expires_at       BIGINT NOT NULL COMMENT 'end of phase one',
    decided_at       BIGINT COMMENT 'NULL while trying',
    finished_at      BIGINT COMMENT 'NULL until every branch has acknowledged',
    due_at           BIGINT COMMENT 'when somebody must look at it if nobody works on it; NULL when it is final',
    cancel_cause     TINYINT COMMENT '1 requested, 2 refused, 3 timed out, 4 a Try unknown, 5 coordinator restarted',
    cancel_branch_id VARCHAR(32) COMMENT 'causes 2 and 4: whose Try',
    cancel_reason    VARCHAR(2048) COMMENT 'causes 1 and 4: in words',
    refusal          TEXT COMMENT 'cause 2: the refusal of the participant, JSON',
    key_hash         BINARY(32) COMMENT 'SHA-256 of the idempotency key; NULL: it has none',
    KEY global_transaction_due (due_at)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin COMMENT = 'one row for each global transaction';

CREATE TABLE IF NOT EXISTS branch (
    xid             BINARY(16) NOT NULL COMMENT 'whose',
    position        SMALLINT NOT NULL COMMENT '0, 1, ...: order of registration',
    branch_id       VARCHAR(32) NOT NULL COMMENT 'its name within the transaction',
    action          VARCHAR(128) NOT NULL COMMENT 'which of the actions of the participant',
    participant     VARCHAR(64) NOT NULL COMMENT 'whose; the configuration may know its address',
    target          VARCHAR(256) NOT NULL COMMENT 'address that the branch brought; empty: none',
    payload         MEDIUMBLOB COMMENT 'only if the coordinator was asked to carry it',
    payload_type    VARCHAR(128) COMMENT 'content type of the payload',
    state           TINYINT NOT NULL COMMENT '1 open, 2 acknowledged, 3 resolved by an operator. All rows of a transaction that finished without a failed attempt stay 1: its own state tells the rest',
    attempts        INT NOT NULL COMMENT 'calls of phase two, as of the latest failed one',
    needs_attention TINYINT NOT NULL COMMENT '1: the participant has asked for a person',
    due_at          BIGINT COMMENT 'after a failed attempt: when the next one is due',
    error_code      VARCHAR(32) COMMENT 'of the latest failed attempt: gRPC code',
    error_message   TEXT COMMENT 'of the same attempt, in words',
    error_at        BIGINT COMMENT 'when it was noticed',
    PRIMARY KEY (xid, position)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin COMMENT = 'one row for each branch of a global transaction';

CREATE TABLE IF NOT EXISTS idempotency (
    key_hash   BINARY(32) NOT NULL PRIMARY KEY COMMENT 'SHA-256 of the key',
    xid        BINARY(16) NOT NULL COMMENT 'the transaction that it gave',
    key_digest BINARY(32) NOT NULL COMMENT 'SHA-256 of what must be the same in a repeat'
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin COMMENT = 'idempotency keys, remembered as long as their transactions';

CREATE TABLE IF NOT EXISTS resolution (
    xid       BINARY(16) NOT NULL COMMENT 'of which transaction',
    branch_id VARCHAR(32) NOT NULL COMMENT 'for which of its branches',
    decision  TINYINT NOT NULL COMMENT '1 confirm, 2 cancel: what the participant should have done',
    name      VARCHAR(128) NOT NULL COMMENT 'of the transaction',
    action    VARCHAR(128) NOT NULL COMMENT 'of the branch',
    operator  VARCHAR(128) NOT NULL COMMENT 'who answered',
    reason    VARCHAR(2048) NOT NULL COMMENT 'why, and what was done instead',
    at        BIGINT NOT NULL COMMENT 'when',
    PRIMARY KEY (xid, branch_id)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin
  COMMENT = 'what operators answered for participants; kept for ever, also when the transaction itself is deleted';

CREATE TABLE IF NOT EXISTS purged (
    `partition` SMALLINT UNSIGNED NOT NULL PRIMARY KEY COMMENT 'of which partition',
    through     BINARY(16) NOT NULL COMMENT 'the largest xid that was ever deleted after its retention'
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin COMMENT = 'how far finished transactions were deleted';

CREATE OR REPLACE VIEW readable_branch AS
SELECT CONCAT(CONV(HEX(SUBSTR(b.xid, 1, 2)), 16, 10), '-', CONV(HEX(SUBSTR(b.xid, 3, 4)), 16, 10), '-',
              CONV(HEX(SUBSTR(b.xid, 7, 6)), 16, 10), '-', LOWER(HEX(SUBSTR(b.xid, 13, 4)))) AS xid,
       b.branch_id, b.action, b.participant, b.target,
       CASE WHEN b.state = 3 THEN 'resolved' WHEN g.state = 4 OR (g.state = 2 AND b.state = 2) THEN 'confirmed'
            WHEN g.state = 5 OR (g.state = 3 AND b.state = 2) THEN 'cancelled' ELSE 'registered' END AS state,
       b.attempts, b.needs_attention,
       TIMESTAMP('1970-01-01') + INTERVAL b.due_at * 1000 MICROSECOND AS due_at, b.error_code, b.error_message
FROM branch AS b JOIN global_transaction AS g ON g.xid = b.xid;

CREATE OR REPLACE VIEW readable_transaction AS
SELECT CONCAT(CONV(HEX(SUBSTR(g.xid, 1, 2)), 16, 10), '-', CONV(HEX(SUBSTR(g.xid, 3, 4)), 16, 10), '-',
              CONV(HEX(SUBSTR(g.xid, 7, 6)), 16, 10), '-', LOWER(HEX(SUBSTR(g.xid, 13, 4)))) AS xid,
       g.name,
       CASE g.state WHEN 1 THEN 'trying' WHEN 2 THEN 'confirming' WHEN 3 THEN 'cancelling' WHEN 4 THEN 'confirmed'
                    WHEN 5 THEN 'cancelled' END AS state,
       (SELECT GROUP_CONCAT(b.participant ORDER BY b.position SEPARATOR ', ') FROM branch AS b
        WHERE b.xid = g.xid AND g.state IN (2, 3) AND b.state = 1) AS waiting_for,
       TIMESTAMP('1970-01-01') + INTERVAL g.begun_at * 1000 MICROSECOND AS begun_at,
       TIMESTAMP('1970-01-01') + INTERVAL g.decided_at * 1000 MICROSECOND AS decided_at,
       TIMESTAMP('1970-01-01') + INTERVAL g.finished_at * 1000 MICROSECOND AS finished_at,
       TIMESTAMP('1970-01-01') + INTERVAL g.due_at * 1000 MICROSECOND AS due_at,
       CASE g.cancel_cause WHEN 1 THEN 'requested' WHEN 2 THEN 'refused' WHEN 3 THEN 'timed out' WHEN 4 THEN 'a try unknown'
                           WHEN 5 THEN 'coordinator restarted' END AS cancel_cause,
       COALESCE(g.cancel_reason, g.refusal) AS cancel_reason,
       g.labels
FROM global_transaction AS g;
