package proc_test

import (
	"net"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/e2e/proc"
)

// An address is given once, whoever listens on it or not.
func TestFreeAddr(t *testing.T) {
	given := map[string]bool{}
	for range 500 {
		addr, err := proc.FreeAddr()
		require.NoError(t, err)
		require.False(t, given[addr], addr)
		given[addr] = true
		_, err = net.Dial("tcp", addr)
		require.ErrorContains(t, err, "refused")
		for range 2 { // once more after it was down
			l, err := net.Listen("tcp", addr)
			require.NoError(t, err)
			c, err := net.Dial("tcp", addr)
			require.NoError(t, err)
			require.NoError(t, c.Close())
			require.NoError(t, l.Close())
		}
	}
}
