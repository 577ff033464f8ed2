// Command raw is what bare go-coap can do: servers that answer a GET with a few bytes, over UDP, TCP, TLS and DTLS. They are
// what the hub is compared with in the same run; it prints where they are, as JSON, and runs until its input ends.
package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"log"
	"math/big"
	"os"
	"time"

	piondtls "github.com/pion/dtls/v3"
	"github.com/plgd-dev/go-coap/v3/dtls"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/mux"
	"github.com/plgd-dev/go-coap/v3/net"
	"github.com/plgd-dev/go-coap/v3/options"
	"github.com/plgd-dev/go-coap/v3/tcp"
	"github.com/plgd-dev/go-coap/v3/udp"
)

func main() {
	at, err := serve([]byte(os.Getenv("RAW_KEY")))
	if err != nil {
		log.Fatal(err)
	}
	if err := json.NewEncoder(os.Stdout).Encode(at); err != nil {
		log.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
}

// serve starts a server for each scheme on loopback and returns their addresses. They end with the process.
func serve(key []byte) (map[string]string, error) {
	router := mux.NewRouter()
	body := bytes.Repeat([]byte("x"), 90)
	if err := router.Handle("/echo", mux.HandlerFunc(func(w mux.ResponseWriter, _ *mux.Message) {
		_ = w.SetResponse(codes.Content, message.TextPlain, bytes.NewReader(body))
	})); err != nil {
		return nil, err
	}
	cert, err := selfSigned()
	if err != nil {
		return nil, err
	}
	const any0 = "127.0.0.1:0"
	u, err := net.NewListenUDP("udp", any0)
	if err != nil {
		return nil, err
	}
	t, err := net.NewTCPListener("tcp", any0)
	if err != nil {
		return nil, err
	}
	s, err := net.NewTLSListener("tcp", any0, &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12})
	if err != nil {
		return nil, err
	}
	d, err := net.NewDTLSListener("udp", any0, net.NewDTLSServerOptions(
		piondtls.WithPSK(func([]byte) ([]byte, error) { return key, nil }), piondtls.WithCipherSuites(piondtls.TLS_PSK_WITH_AES_128_CCM_8),
		piondtls.WithConnectionIDGenerator(piondtls.RandomCIDGenerator(8)),
	))
	if err != nil {
		return nil, err
	}
	handler := options.WithMux(router)
	end := func(err error) { log.Fatal(err) }
	go func() { end(udp.NewServer(handler).Serve(u)) }()
	go func() { end(tcp.NewServer(handler).Serve(t)) }()
	go func() { end(tcp.NewServer(handler).Serve(s)) }()
	go func() { end(dtls.NewServer(handler).Serve(d)) }()
	return map[string]string{
		"coap": "coap://" + u.LocalAddr().String(), "coap+tcp": "coap+tcp://" + t.Addr().String(),
		"coaps+tcp": "coaps+tcp://" + s.Addr().String(), "coaps": "coaps://" + d.Addr().String(),
	}, nil
}

func selfSigned() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}
