BEGIN TRANSACTION;
CREATE TABLE checkpoints (
            run_id TEXT NOT NULL REFERENCES runs (run_id),
            round INTEGER NOT NULL,
            values_sha256 TEXT NOT NULL,
            optimizer_sha256 TEXT,              -- discarded by and by: see MOST_STATES
            average_sha256 TEXT,
            reference_sha256 TEXT,
            committed INTEGER NOT NULL,
            visit_rounds INTEGER NOT NULL,
            phase TEXT NOT NULL,
            delta_sizes TEXT NOT NULL,
            PRIMARY KEY (run_id, round)
        ) WITHOUT ROWID;
INSERT INTO "checkpoints" VALUES('tiny-9f2cce',0,'e73ca9afde181f893c9bac3106f00fafda1682f617e7e030d238f218deb8ddee','dd4600a5e2fe83f96198a66fe856ca90f994defb60b43c5e41bcef96683ad6f5',NULL,NULL,1,0,'training','{"head": 0.17093255080693484, "s0": 0.1996506037330956, "s1": 0.20991181104843104, "s2": 0.16903060832888175}');
CREATE TABLE devices (
            device_id TEXT PRIMARY KEY,
            name TEXT NOT NULL,
            class TEXT NOT NULL,
            public_key TEXT NOT NULL,
            enrolled_s REAL NOT NULL,
            revoked_s REAL,
            seen_s REAL,             -- last check-in
            cap_bytes INTEGER,
            floor_bytes INTEGER,
            example_count INTEGER,
            runtime_version TEXT
        , expected_s REAL, setup TEXT NOT NULL DEFAULT '', resumed_s REAL, trains INTEGER NOT NULL DEFAULT 1, release INTEGER NOT NULL DEFAULT 0, not_eligible TEXT NOT NULL DEFAULT '');
INSERT INTO "devices" VALUES('d-1af1e0020c458c9b','a','generic','0qexeOE5CwF+6pkQXi3r5clyxo8cqVieQtaiQC4PZLg=',1700000000.0,NULL,1700000000.0,1073741824,1048576,10,'test',1700000060.0,'',NULL,1,0,'');
INSERT INTO "devices" VALUES('d-f6aece72127fb22b','b','generic','E6OPE1FT20LWkV+WYy8ExL/bwuu9M/ipS3NVt+Fb71w=',1700000000.0,NULL,1700000000.0,1073741824,1048576,10,'test',1700000060.0,'',NULL,1,0,'');
INSERT INTO "devices" VALUES('d-c10c5a09ab024cd0','c','generic','EMq05JebLRCnupbShqiCKfINf5DObLN1FiMYOtBw9LI=',1700000000.0,NULL,1700000000.0,1073741824,1048576,10,'test',1700000060.0,'',NULL,1,0,'');
CREATE TABLE evaluations (
            run_id TEXT NOT NULL REFERENCES runs (run_id),
            round INTEGER NOT NULL,             -- -1: the values the run started from
            values_sha256 TEXT NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('pending', 'done', 'failed')),
            rows INTEGER,
            accuracy REAL,
            mean_loss REAL,
            seconds REAL,
            message TEXT NOT NULL DEFAULT '', tokens INTEGER NOT NULL DEFAULT 0,
            PRIMARY KEY (run_id, round)
        );
CREATE TABLE events (
            event_id INTEGER PRIMARY KEY,
            at_s REAL NOT NULL,
            run_id TEXT,
            round INTEGER,
            device TEXT,                        -- the device's name
            task_id TEXT,
            code TEXT NOT NULL,
            message TEXT NOT NULL
        );
INSERT INTO "events" VALUES(1,1700000000.0,NULL,NULL,'a',NULL,'enrolled','class generic');
INSERT INTO "events" VALUES(2,1700000000.0,NULL,NULL,'b',NULL,'enrolled','class generic');
INSERT INTO "events" VALUES(3,1700000000.0,NULL,NULL,'c',NULL,'enrolled','class generic');
INSERT INTO "events" VALUES(4,1700000000.0,'tiny-9f2cce',NULL,NULL,NULL,'run_created','package tiny');
CREATE TABLE marks (name TEXT PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE migrations (name TEXT PRIMARY KEY, applied_s REAL NOT NULL);
INSERT INTO "migrations" VALUES('create_devices',1795829115.0);
INSERT INTO "migrations" VALUES('create_runs',1795829115.0);
INSERT INTO "migrations" VALUES('count_evaluated_tokens',1795829115.0);
INSERT INTO "migrations" VALUES('deal_heads',1795829115.0);
INSERT INTO "migrations" VALUES('count_change_bytes',1795829115.0);
INSERT INTO "migrations" VALUES('keep_more_values',1795829115.0);
INSERT INTO "migrations" VALUES('mark_gated_rounds',1795829115.0);
INSERT INTO "migrations" VALUES('index_what_is_open',1795829115.0);
INSERT INTO "migrations" VALUES('set_devices_aside',1795829115.0);
INSERT INTO "migrations" VALUES('visit_devices',1795829115.0);
INSERT INTO "migrations" VALUES('publish_releases',1795829115.0);
INSERT INTO "migrations" VALUES('state_estimators',1795829115.0);
INSERT INTO "migrations" VALUES('compare_results',1795829115.0);
INSERT INTO "migrations" VALUES('mark_moments',1795829115.0);
INSERT INTO "migrations" VALUES('expect_signs_of_life',1795829115.0);
INSERT INTO "migrations" VALUES('pause_runs',1795829116.0);
INSERT INTO "migrations" VALUES('keep_checkpoints',1795829116.0);
INSERT INTO "migrations" VALUES('index_tasks_of_devices',1795829116.0);
INSERT INTO "migrations" VALUES('buffer_results',1795829116.0);
INSERT INTO "migrations" VALUES('tell_eligibility',1795829116.0);
INSERT INTO "migrations" VALUES('take_sums_off',1795829116.0);
CREATE TABLE nonces (
            device_id TEXT NOT NULL REFERENCES devices,
            nonce TEXT NOT NULL,
            expires_s REAL NOT NULL,
            PRIMARY KEY (device_id, nonce)
        ) WITHOUT ROWID;
INSERT INTO "nonces" VALUES('d-1af1e0020c458c9b','a-00000001',1700000301.0);
INSERT INTO "nonces" VALUES('d-1af1e0020c458c9b','a-00000002',1700000301.0);
INSERT INTO "nonces" VALUES('d-1af1e0020c458c9b','a-00000003',1700000301.0);
INSERT INTO "nonces" VALUES('d-1af1e0020c458c9b','a-00000004',1700000301.0);
INSERT INTO "nonces" VALUES('d-c10c5a09ab024cd0','c-00000001',1700000301.0);
INSERT INTO "nonces" VALUES('d-c10c5a09ab024cd0','c-00000002',1700000301.0);
INSERT INTO "nonces" VALUES('d-c10c5a09ab024cd0','c-00000003',1700000301.0);
INSERT INTO "nonces" VALUES('d-f6aece72127fb22b','b-00000001',1700000301.0);
INSERT INTO "nonces" VALUES('d-f6aece72127fb22b','b-00000002',1700000301.0);
INSERT INTO "nonces" VALUES('d-f6aece72127fb22b','b-00000003',1700000301.0);
CREATE TABLE published_runs (        -- each further committed round of these becomes a release
            run_id TEXT PRIMARY KEY REFERENCES runs (run_id),
            lowest_accuracy REAL,
            highest_loss REAL
        ) WITHOUT ROWID;
CREATE TABLE releases (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            run_id TEXT NOT NULL REFERENCES runs (run_id),
            round INTEGER NOT NULL,
            values_sha256 TEXT NOT NULL,
            lowest_accuracy REAL,
            highest_loss REAL,
            published_s REAL NOT NULL
        );
CREATE TABLE results (
            task_id TEXT PRIMARY KEY REFERENCES tasks,
            change_sha256 TEXT NOT NULL,
            examples INTEGER NOT NULL,
            steps_applied INTEGER NOT NULL,
            steps_skipped INTEGER NOT NULL,
            mean_loss REAL,
            seconds REAL NOT NULL,
            memory TEXT NOT NULL,               -- JSON MemoryReport
            received_s REAL NOT NULL
        , change_bytes INTEGER NOT NULL DEFAULT 0, estimator TEXT, draws INTEGER NOT NULL DEFAULT 0, score REAL, left_out TEXT NOT NULL DEFAULT '', entered INTEGER, kept TEXT NOT NULL DEFAULT '[]', removed TEXT NOT NULL DEFAULT '[]');
INSERT INTO "results" VALUES('tiny-9f2cce-r0-s0-a0','081a8281ee22c59ecfe195e0d0322334d9e5ffe38090b304e58cd961374772bb',4,3,0,0.5,1.0,'{"predicted_peak_bytes":100,"high_water_bytes":90,"cap_bytes":1073741824,"cgroup_peak_bytes":null,"anonymous_bytes":0,"file_bytes":0,"floor_bytes":0,"phases":{},"judge":""}',1700000000.0,244,NULL,0,1.16800809904602231892e-02,'',NULL,'[]','[]');
INSERT INTO "results" VALUES('tiny-9f2cce-r0-s1-a0','4ff102c5069518be6293d40fc885a7b61e3d8ed6591050ef7c3428d390a1e8a7',5,3,0,0.5,1.0,'{"predicted_peak_bytes":100,"high_water_bytes":90,"cap_bytes":1073741824,"cgroup_peak_bytes":null,"anonymous_bytes":0,"file_bytes":0,"floor_bytes":0,"phases":{},"judge":""}',1700000000.0,176,NULL,0,3.2006006087393096271e-02,'',NULL,'[]','[]');
INSERT INTO "results" VALUES('tiny-9f2cce-r1-s0-a0','5ab9c771f5f355f9eb1e680aecae9a3b542193238fc2cc2a1efe781552d7c837',4,3,0,0.5,1.0,'{"predicted_peak_bytes":100,"high_water_bytes":90,"cap_bytes":1073741824,"cgroup_peak_bytes":null,"anonymous_bytes":0,"file_bytes":0,"floor_bytes":0,"phases":{},"judge":""}',1700000000.0,176,NULL,0,NULL,'',NULL,'[]','[]');
CREATE TABLE rounds (
            run_id TEXT NOT NULL REFERENCES runs (run_id),
            round INTEGER NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('selecting', 'collecting', 'aggregating',
                                                 'committed', 'abandoned')),
            reason TEXT NOT NULL DEFAULT '',
            opened_s REAL NOT NULL,
            deadline_s REAL NOT NULL,
            closed_s REAL,
            values_sha256 TEXT NOT NULL,        -- slice values the round starts from
            bytes_up INTEGER NOT NULL DEFAULT 0,
            bytes_down INTEGER NOT NULL DEFAULT 0, gated INTEGER NOT NULL DEFAULT 0, phase TEXT NOT NULL DEFAULT 'training', rolled_back_s REAL,
            PRIMARY KEY (run_id, round)
        );
INSERT INTO "rounds" VALUES('tiny-9f2cce',0,'committed','',1700000000.0,1700000070.0,1700000000.0,'fce748b6544fc366e265e38fb6e07a0762d9cebf49e8f2741740e91447fd667b',0,0,0,'training',NULL);
INSERT INTO "rounds" VALUES('tiny-9f2cce',1,'selecting','',1700000000.0,1700000070.0,NULL,'e73ca9afde181f893c9bac3106f00fafda1682f617e7e030d238f218deb8ddee',0,0,0,'training',NULL);
CREATE TABLE runs (
            position INTEGER PRIMARY KEY,       -- runs take turns in this order
            run_id TEXT NOT NULL UNIQUE,
            config TEXT NOT NULL,               -- JSON RunConfig
            package_sha256 TEXT NOT NULL,
            package_signature TEXT NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'evaluating',
                                                 'finished', 'failed', 'stopped')),
            reason TEXT NOT NULL DEFAULT '',
            created_s REAL NOT NULL,
            started_s REAL,
            finished_s REAL,
            values_sha256 TEXT NOT NULL,        -- current slice values
            optimizer_sha256 TEXT,              -- server optimiser state beside them
            next_round INTEGER NOT NULL DEFAULT 0,
            committed INTEGER NOT NULL DEFAULT 0,
            abandoned_in_a_row INTEGER NOT NULL DEFAULT 0
        , average_sha256 TEXT, reference_sha256 TEXT, phase TEXT NOT NULL DEFAULT 'training', visit_rounds INTEGER NOT NULL DEFAULT 0, delta_sizes TEXT NOT NULL DEFAULT '{}', paused_s REAL);
INSERT INTO "runs" VALUES(1,'tiny-9f2cce','{"seed":5,"train_head":true,"steps":3,"batch_size":4,"draws":1,"sequence_limit":128,"directions":"one_slice","loss":"cross_entropy","update":"forward","report":"weights","tau":10.0,"head":"exact","epochs":0,"difference":"central","difference_step":0.001,"candidates":1,"jvp_limit":null,"features":[],"pooling":"package","sums_dtype":"float32","rank_mode":"fixed","sums_projection":0,"exits":[],"name":"tiny","package":"/srv/package","publisher_key":"eoipQ2Hv8wD3eemn4iVB75ZgmiiatMGHQDK42SUeOrA=","rounds":2,"devices_per_round":2,"min_devices":2,"min_results":1,"selection_timeout_s":10.0,"deadline_s":60.0,"late_grace_s":0.0,"alive_every_s":60.0,"poll_min_s":0.3,"poll_max_s":0.6,"max_abandoned":2,"slices":"all","local_optimizer":{"name":"accumulate","slice_rate":1.0,"head_rate":1.0},"server_optimizer":{"slices":{"name":"sgd","rate":1.0,"beta1":0.9,"beta2":0.99,"tau":0.001},"head":{"name":"sgd","rate":1.0,"beta1":0.9,"beta2":0.99,"tau":0.001}},"evaluation":null,"seen_window_s":null,"split":"cyclic","head_split":false,"head_warm_up_rounds":0,"lora_aggregation":"factors","normalise_steps":false,"average_from_round":null,"gate_variance":null,"rate_decay":"none","patience":0,"visit":"last","ridge":null,"continue_from":null,"norm_limit":1000.0,"max_left_out":3,"robust_mean":"none","trim_share":0.1,"beside_others":false,"enough_results":null,"buffer_size":null,"max_staleness":10}','a7e50a5d391ba3744954af7ca5387c0ad136d1bfe96fa39bb93fce0d2a58ebc6','MglXhhIfTunSyEtVP20BWqHEizFFEwjA8Xds0A2vwuFcSnn5j9EkDm8HEI1jfdQVmYc9urNkrC2hVy+3oaEQCA==','running','',1700000000.0,1700000000.0,NULL,'e73ca9afde181f893c9bac3106f00fafda1682f617e7e030d238f218deb8ddee','dd4600a5e2fe83f96198a66fe856ca90f994defb60b43c5e41bcef96683ad6f5',2,1,0,NULL,NULL,'training',0,'{"head": 0.17093255080693484, "s0": 0.1996506037330956, "s1": 0.20991181104843104, "s2": 0.16903060832888175}',NULL);
CREATE TABLE set_aside (
            run_id TEXT NOT NULL REFERENCES runs (run_id),
            device_id TEXT NOT NULL REFERENCES devices,
            at_s REAL NOT NULL,
            reason TEXT NOT NULL,
            setup TEXT NOT NULL,                -- of the device at that moment
            PRIMARY KEY (run_id, device_id)
        ) WITHOUT ROWID;
CREATE TABLE slots (
            run_id TEXT NOT NULL,
            round INTEGER NOT NULL,
            slot INTEGER NOT NULL,
            slices TEXT NOT NULL,               -- JSON list of slice names
            PRIMARY KEY (run_id, round, slot),
            FOREIGN KEY (run_id, round) REFERENCES rounds
        );
INSERT INTO "slots" VALUES('tiny-9f2cce',0,0,'["s0", "s2", "head"]');
INSERT INTO "slots" VALUES('tiny-9f2cce',0,1,'["s1", "head"]');
INSERT INTO "slots" VALUES('tiny-9f2cce',1,0,'["s1", "head"]');
INSERT INTO "slots" VALUES('tiny-9f2cce',1,1,'["s0", "s2", "head"]');
CREATE TABLE tasks (
            task_id TEXT PRIMARY KEY,
            run_id TEXT NOT NULL,
            round INTEGER NOT NULL,
            slot INTEGER NOT NULL,
            attempt INTEGER NOT NULL,           -- 0 for the first device of the slot
            device_id TEXT NOT NULL REFERENCES devices,
            state TEXT NOT NULL CHECK (state IN ('reserved', 'working', 'counted', 'lapsed')),
            reason TEXT NOT NULL DEFAULT '',
            reserved_s REAL NOT NULL,
            due_s REAL NOT NULL,                -- to check in while reserved, to deliver while working
            required_bytes INTEGER NOT NULL DEFAULT 0,
            task TEXT,                          -- the signed JSON once handed out
            signature TEXT, alive_by_s REAL, committed_before INTEGER NOT NULL DEFAULT 0,
            UNIQUE (run_id, round, slot, attempt),
            FOREIGN KEY (run_id, round, slot) REFERENCES slots
        );
INSERT INTO "tasks" VALUES('tiny-9f2cce-r0-s0-a0','tiny-9f2cce',0,0,0,'d-f6aece72127fb22b','counted','',1700000000.0,1700000060.0,70254592,'{"task_id":"tiny-9f2cce-r0-s0-a0","run_id":"tiny-9f2cce","round":0,"slot":0,"seed":5,"package":"a7e50a5d391ba3744954af7ca5387c0ad136d1bfe96fa39bb93fce0d2a58ebc6","package_signature":"MglXhhIfTunSyEtVP20BWqHEizFFEwjA8Xds0A2vwuFcSnn5j9EkDm8HEI1jfdQVmYc9urNkrC2hVy+3oaEQCA==","state":"fce748b6544fc366e265e38fb6e07a0762d9cebf49e8f2741740e91447fd667b","slices":["s0","s2"],"train_head":true,"steps":3,"batch_size":4,"draws":1,"sequence_limit":16,"optimizer":{"name":"accumulate","slice_rate":1.0,"head_rate":1.0},"required_bytes":70254592,"deadline_s":60.0,"directions":"one_slice","loss":"cross_entropy","update":"forward","report":"weights","tau":10.0,"head":"exact","epochs":0,"freeze_a":false,"difference":"central","difference_step":0.001,"candidates":1,"reference":null,"jvp_limit":null,"features":[],"pooling":"package","sums_dtype":"float32","rank_mode":"fixed","sums_projection":0,"exits":[],"rank":0,"handed_in":[]}','EnuMvuqbzXCZQoBlfw5EaTI6Vek+rt04ZRF89frw2Hf4jPVHwrAYx6CFuVjJk3st0hwHi6DfC3ytWuNZfZrMDg==',NULL,0);
INSERT INTO "tasks" VALUES('tiny-9f2cce-r0-s1-a0','tiny-9f2cce',0,1,0,'d-c10c5a09ab024cd0','counted','',1700000000.0,1700000060.0,70254592,'{"task_id":"tiny-9f2cce-r0-s1-a0","run_id":"tiny-9f2cce","round":0,"slot":1,"seed":5,"package":"a7e50a5d391ba3744954af7ca5387c0ad136d1bfe96fa39bb93fce0d2a58ebc6","package_signature":"MglXhhIfTunSyEtVP20BWqHEizFFEwjA8Xds0A2vwuFcSnn5j9EkDm8HEI1jfdQVmYc9urNkrC2hVy+3oaEQCA==","state":"fce748b6544fc366e265e38fb6e07a0762d9cebf49e8f2741740e91447fd667b","slices":["s1"],"train_head":true,"steps":3,"batch_size":4,"draws":1,"sequence_limit":16,"optimizer":{"name":"accumulate","slice_rate":1.0,"head_rate":1.0},"required_bytes":70254592,"deadline_s":60.0,"directions":"one_slice","loss":"cross_entropy","update":"forward","report":"weights","tau":10.0,"head":"exact","epochs":0,"freeze_a":false,"difference":"central","difference_step":0.001,"candidates":1,"reference":null,"jvp_limit":null,"features":[],"pooling":"package","sums_dtype":"float32","rank_mode":"fixed","sums_projection":0,"exits":[],"rank":0,"handed_in":[]}','HvqN6TKtXH8o8uSDskeBAM9QqbizBkVqUSpe8Sk17l+P3EkagpbKxR53aSr8rsUoiDPPz3pE5DV0+Tx/IlcOBw==',NULL,0);
INSERT INTO "tasks" VALUES('tiny-9f2cce-r1-s0-a0','tiny-9f2cce',1,0,0,'d-1af1e0020c458c9b','counted','',1700000000.0,1700000060.0,70254592,'{"task_id":"tiny-9f2cce-r1-s0-a0","run_id":"tiny-9f2cce","round":1,"slot":0,"seed":5,"package":"a7e50a5d391ba3744954af7ca5387c0ad136d1bfe96fa39bb93fce0d2a58ebc6","package_signature":"MglXhhIfTunSyEtVP20BWqHEizFFEwjA8Xds0A2vwuFcSnn5j9EkDm8HEI1jfdQVmYc9urNkrC2hVy+3oaEQCA==","state":"e73ca9afde181f893c9bac3106f00fafda1682f617e7e030d238f218deb8ddee","slices":["s1"],"train_head":true,"steps":3,"batch_size":4,"draws":1,"sequence_limit":16,"optimizer":{"name":"accumulate","slice_rate":1.0,"head_rate":1.0},"required_bytes":70254592,"deadline_s":60.0,"directions":"one_slice","loss":"cross_entropy","update":"forward","report":"weights","tau":10.0,"head":"exact","epochs":0,"freeze_a":false,"difference":"central","difference_step":0.001,"candidates":1,"reference":null,"jvp_limit":null,"features":[],"pooling":"package","sums_dtype":"float32","rank_mode":"fixed","sums_projection":0,"exits":[],"rank":0,"handed_in":[]}','uran2ncBfcmCwIiGETxC7P6jLHVxlvnQvAWoq+4C4wvlBUs/qcSw48a5cuxL6fzzTKukOhwczHPRqIpXlacLCQ==',NULL,1);
INSERT INTO "tasks" VALUES('tiny-9f2cce-r1-s1-a0','tiny-9f2cce',1,1,0,'d-c10c5a09ab024cd0','reserved','',1700000000.0,1700000062.0,0,NULL,NULL,NULL,0);
CREATE TABLE tokens (
            token_sha256 TEXT PRIMARY KEY,
            expires_s REAL NOT NULL,
            device_id TEXT REFERENCES devices   -- who used it
        );
INSERT INTO "tokens" VALUES('2b0af9eb66212b1f98a0298633952552fe9390a5b279544c0e9ee488fc8df291',1700086400.0,'d-1af1e0020c458c9b');
INSERT INTO "tokens" VALUES('524380f460455f9505d3545b0a297961c30def98a88b4d48e3299c92cca0c56f',1700086400.0,'d-f6aece72127fb22b');
INSERT INTO "tokens" VALUES('7aa78e9a5b4e610558b2ebaadaa8c1a4860bb832ce081d18eeedb9e2edf48c6a',1700086400.0,'d-c10c5a09ab024cd0');
CREATE UNIQUE INDEX device_names ON devices (name) WHERE revoked_s IS NULL;
CREATE INDEX nonce_expiry ON nonces (expires_s);
CREATE UNIQUE INDEX one_counted ON tasks (run_id, round, slot) WHERE state = 'counted';
CREATE INDEX events_by_run ON events (run_id, event_id);
CREATE INDEX open_rounds ON rounds (run_id, round) WHERE state IN ('selecting', 'collecting', 'aggregating');
CREATE INDEX open_tasks ON tasks (run_id, device_id) WHERE state IN ('reserved', 'working');
CREATE INDEX tasks_of_devices ON tasks (device_id, reserved_s);
CREATE INDEX entered_results ON results (entered) WHERE entered IS NOT NULL;
DELETE FROM "sqlite_sequence";
COMMIT;
