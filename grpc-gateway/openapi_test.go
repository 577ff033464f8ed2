package grpcgateway

import (
	"net/http"
	"net/http/httptest"
	"testing"
)

func checkAnswer(t testing.TB, r *http.Request, rec *httptest.ResponseRecorder) { t.Helper() }
