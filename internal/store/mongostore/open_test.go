package mongostore_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.mongodb.org/mongo-driver/v2/bson"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/conf"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/mongostore"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

// refused opens a store that must not come up.
func refused(t *testing.T, what string, cfg mongostore.Config, o mongostore.Options, tuning mongostore.Tuning, code string) {
	t.Helper()
	kind := hub.Precondition
	if code == "store-unreachable" { // who starts waits for it
		kind, cfg.SelectTimeout = hub.Unavailable, 100*time.Millisecond
	}
	s, err := mongostore.OpenTuned(t.Context(), cfg, o, tuning)
	if err == nil {
		s.Kill()
	}
	wantError(t, what, err, kind, code)
}

// What stands between the hub and its database is said when it starts, and the same start works once it is put right.
func TestStartSaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	none, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	must(t, none.Close())
	db, feed := database(t), storetest.NewFeed()
	refused(t, "nobody listens", config("mongodb://"+none.Addr().String(), db), opts(feed), fast, "store-unreachable")

	p := newProxy(t)
	cfg := config(p.uri(), db)
	replace := func(doc bson.D, names ...string) {
		p.on(func(c command) action {
			for _, name := range names {
				if c.name == name {
					return action{answer: doc}
				}
			}
			return action{}
		})
	}
	replace(fails(13, "Unauthorized"), "insert", "update", "createIndexes", "find")
	refused(t, "a user without rights", cfg, opts(feed), fast, "store-login-refused")
	replace(fails(13, "Unauthorized"), "insert", "update")
	refused(t, "a user who may read only", cfg, opts(feed), fast, "store-login-refused")
	hello := func(more ...bson.E) bson.D {
		return append(bson.D{
			{Key: "ok", Value: 1.0},
			{Key: "maxWireVersion", Value: int32(21)},
			{Key: "maxBsonObjectSize", Value: int32(16 << 20)},
			{Key: "maxMessageSizeBytes", Value: int32(48000000)},
			{Key: "maxWriteBatchSize", Value: int32(50)},
		}, more...)
	}
	replace(hello(bson.E{Key: "isWritablePrimary", Value: false}, bson.E{Key: "secondary", Value: true}), "hello")
	refused(t, "a secondary", cfg, opts(feed), fast, "store-read-only")
	replace(fails(18, "AuthenticationFailed"), "saslStart")
	wrong := cfg
	wrong.User, wrong.Password = "hub", "wrong"
	refused(t, "a wrong password", wrong, opts(feed), fast, "store-login-refused")

	router := hello(bson.E{Key: "isWritablePrimary", Value: true}, bson.E{Key: "msg", Value: "isdbgrid"})
	shardedBy := func(key string) {
		p.on(func(c command) action {
			switch {
			case c.name == "hello":
				return action{answer: router}
			case c.name == "find" && c.collection == "collections":
				return action{answer: bson.D{{Key: "ok", Value: 1.0}, {Key: "cursor", Value: bson.D{
					{Key: "id", Value: int64(0)},
					{Key: "ns", Value: "config.collections"},
					{Key: "firstBatch", Value: bson.A{bson.D{{Key: "key", Value: bson.D{{Key: key, Value: int32(1)}}}}}},
				}}}}
			}
			return action{}
		})
	}
	shardedBy("t")
	refused(t, "a log sharded by time", cfg, opts(feed), fast, "store-sharded-wrongly")
	shardedBy("_id")
	closeStore(t, open(t, cfg, opts(feed), fast))
	p.on(nil)
	closeStore(t, open(t, cfg, opts(feed), fast))
}

// A database is one cluster's.
func TestDatabaseIsOfOneCluster(t *testing.T) {
	t.Parallel()
	cfg, feed := config(uri, database(t)), storetest.NewFeed()
	s := open(t, cfg, opts(feed), fast)
	o := opts(feed)
	o.HubID = "hub-2"
	refused(t, "another hub", cfg, o, fast, "store-of-another-hub")
	o = opts(feed)
	o.ClusterSecret = "fedcba9876543210"
	refused(t, "another cluster with the same hub ID", cfg, o, fast, "store-of-another-cluster")
	refused(t, "another cluster with the same hub ID and secret", cfg, opts(storetest.NewFeed()), fast, "store-of-another-cluster")
	o.ClusterSecret = "short"
	refused(t, "a secret that is none", cfg, o, fast, "store-config-invalid")

	again := open(t, cfg, opts(feed), fast)
	if again.LogID() != s.LogID() {
		t.Errorf("two processes of a cluster have the logs %s and %s", s.LogID(), again.LogID())
	}
	s.Kill()
	closeStore(t, again)
	// A writer that is dead keeps nobody out: the feed was made anew. Cursors of the old one do not fit.
	anew := open(t, cfg, opts(storetest.NewFeed()), fast)
	if anew.LogID() == s.LogID() {
		t.Error("another feed has the same log ID")
	}
	closeStore(t, anew)
}

// A newer schema is refused, an older one brought forward once, also when it broke off or several try at a time.
func TestSchemaMovesForward(t *testing.T) {
	t.Parallel()
	cfg, feed := config(uri, database(t)), storetest.NewFeed()
	s := open(t, cfg, opts(feed), fast)
	must(t, add(t.Context(), s, storetest.Device(1), 1))
	closeStore(t, s)

	var ran atomic.Int32
	step := func(context.Context) error { ran.Add(1); return nil }
	newer := fast
	newer.Steps = append(newer.Steps, func(context.Context) error { return errors.New("broken off") })
	if s, err := mongostore.OpenTuned(t.Context(), cfg, opts(feed), newer); err == nil {
		s.Kill()
		t.Error("a step that fails is taken for done")
	}
	newer.Steps[0] = step
	a := open(t, cfg, opts(feed), newer)
	b := open(t, cfg, opts(feed), newer)
	if n := ran.Load(); n != 1 {
		t.Errorf("the step ran %d times", n)
	}
	wantLog(t, b, feed, storetest.Device(1), 1)
	closeStore(t, a)
	closeStore(t, b)
	refused(t, "data of a newer version", cfg, opts(feed), fast, "data-too-new")
	fresh := config(uri, database(t))
	closeStore(t, open(t, fresh, opts(feed), newer))
	if n := ran.Load(); n != 1 {
		t.Error("a step ran on a database without data")
	}
}

// TLS with certificates from files; a hub that is not known, or a server that is not, does not connect.
func TestTLS(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ca, key := authority(t)
	server, client := issue(t, ca, key, "127.0.0.1"), issue(t, ca, key, "coaphub")
	pool := x509.NewCertPool()
	pool.AddCert(ca)
	p := newProxy(t, &tls.Config{Certificates: []tls.Certificate{server}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert})
	cfg, feed := config(p.uri(), database(t)), storetest.NewFeed()
	cfg.TLS = mongostore.TLSConfig{
		Enabled: true, CAs: []string{filepath.Join(dir, "ca.pem")}, CertFile: filepath.Join(dir, "cert.pem"), KeyFile: filepath.Join(dir, "key.pem"),
	}
	refused(t, "files that are not there", cfg, opts(feed), fast, "store-config-invalid")
	writePEM(t, cfg.TLS.CAs[0], "CERTIFICATE", ca.Raw)
	writePEM(t, cfg.TLS.CertFile, "CERTIFICATE", client.Certificate[0])
	der, err := x509.MarshalPKCS8PrivateKey(client.PrivateKey)
	must(t, err)
	writePEM(t, cfg.TLS.KeyFile, "PRIVATE KEY", der)

	s := open(t, cfg, opts(feed), fast)
	must(t, add(t.Context(), s, storetest.Device(1), 1))
	closeStore(t, s)
	without := cfg
	without.TLS.CertFile, without.TLS.KeyFile = "", ""
	refused(t, "without a certificate", without, opts(feed), fast, "store-unreachable")
	without.TLS = mongostore.TLSConfig{}
	refused(t, "without TLS", without, opts(feed), fast, "store-unreachable")
	stranger, _ := authority(t)
	writePEM(t, cfg.TLS.CAs[0], "CERTIFICATE", stranger.Raw)
	refused(t, "a server of another authority", cfg, opts(feed), fast, "store-unreachable")
}

func authority(t *testing.T) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotAfter: time.Now().Add(time.Hour), IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	must(t, err)
	ca, err := x509.ParseCertificate(der)
	must(t, err)
	return ca, key
}

func issue(t *testing.T, ca *x509.Certificate, by *ecdsa.PrivateKey, name string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour)}
	if ip := net.ParseIP(name); ip != nil {
		tmpl.IPAddresses = []net.IP{ip}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca, key.Public(), by)
	must(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func writePEM(t *testing.T, file, kind string, der []byte) {
	t.Helper()
	must(t, os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
}

// After Close everything is refused, who waits for the feed is told, and the metrics are gone.
func TestClosedStoreRefuses(t *testing.T) {
	t.Parallel()
	reg := prometheus.NewRegistry()
	o := opts(storetest.NewFeed())
	o.Registerer = reg
	s := open(t, config(uri, database(t)), o, fast)
	if all, err := reg.Gather(); err != nil || len(all) == 0 {
		t.Errorf("%d metrics, %v", len(all), err)
	}
	waits := make(chan error, 1)
	go func() { waits <- s.WaitFeed(context.Background(), hub.Position{}) }()
	closeStore(t, s)
	closeStore(t, s)
	wantError(t, "wait", <-waits, hub.Unavailable, "store-closed")
	wantError(t, "append", add(t.Context(), s, storetest.Device(1), 1), hub.Unavailable, "store-closed")
	_, err := s.Load(t.Context(), storetest.Device(1))
	wantError(t, "load", err, hub.Unavailable, "store-closed")
	_, err = s.Get(t.Context(), "c", "k")
	wantError(t, "get", err, hub.Unavailable, "store-closed")
	_, err = s.Put(t.Context(), "c", store.Doc{Key: "k"})
	wantError(t, "put", err, hub.Unavailable, "store-closed")
	if all, err := reg.Gather(); err != nil || len(all) != 0 {
		t.Errorf("%d metrics are left, %v", len(all), err)
	}
}

func TestConfigIsChecked(t *testing.T) {
	t.Parallel()
	good := mongostore.DefaultConfig()
	good.URI = "mongodb://db1,db2/?replicaSet=rs0"
	if p := good.Problems(); len(p) != 0 {
		t.Errorf("a good configuration has problems: %v", p)
	}
	for path, change := range map[string]func(c *mongostore.Config){
		"uri":            func(c *mongostore.Config) { c.URI = "" },
		"uri ":           func(c *mongostore.Config) { c.URI = "http://db1" },
		"uri  ":          func(c *mongostore.Config) { c.URI = "mongodb://me:secret@db1" },
		"uri   ":         func(c *mongostore.Config) { c.URI = "mongodb://db1/?w=7&nonsense=%" },
		"database":       func(c *mongostore.Config) { c.Database = "a.b" },
		"user":           func(c *mongostore.Config) { c.Password = "x" },
		"tls":            func(c *mongostore.Config) { c.TLS.Enabled, c.TLS.CertFile = true, "cert.pem" },
		"tls ":           func(c *mongostore.Config) { c.TLS.CAs = []string{"ca.pem"} },
		"pool.max":       func(c *mongostore.Config) { c.Pool.Max = 0 },
		"connectTimeout": func(c *mongostore.Config) { c.ConnectTimeout = 0 },
		"selectTimeout":  func(c *mongostore.Config) { c.SelectTimeout = time.Hour },
		"timeout":        func(c *mongostore.Config) { c.Timeout = -1 },
		"settleTimeout":  func(c *mongostore.Config) { c.SettleTimeout = 10 * time.Minute },
	} {
		c := good
		change(&c)
		got := c.Problems()
		want := path
		for len(want) > 0 && want[len(want)-1] == ' ' {
			want = want[:len(want)-1]
		}
		if len(got) != 1 || got[0].Path != want {
			t.Errorf("%q: problems %v", path, got)
		}
		for _, p := range got {
			if conf.Problems(got).Err() == nil || len(p.Text) == 0 {
				t.Errorf("%q: %v", path, p)
			}
		}
	}
}
